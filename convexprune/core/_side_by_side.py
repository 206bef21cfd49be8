"""Problems of equal shape as a single problem, so that a GPU gets every step of all problems at once."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from math import inf
from typing import Self

import torch
from torch import Tensor

from convexprune.core._abstract_penalty import AbstractPenalty, Elementwise
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.core._sum_of_squares import UNKNOWN, Cache
from convexprune.core._symmetric import cholesky, power_of_two

LARGEST = 2**27  # numbers in a stack of Gram matrices: 1 GiB


@dataclass(frozen=True, eq=False)
class SideBySide(Quadratic):
    """Quadratics of e weights [m n] as a quadratic of all rows: the weight is [e m, n], and `gram` is H [e n n].

    Properties of inputs, `scale` and `dead`, are by row: [e m, n]. The factors are computed together; if a factor does
    not exist, problems are treated singly (`blocks`).
    """

    def __post_init__(self, checked: bool) -> None:
        if self.cache is None:
            object.__setattr__(self, "cache", Cache(self.gram, torch.finfo(self.energy.dtype).eps, self.energy))

    @classmethod
    def of(cls, quadratics: Sequence[Quadratic]) -> Self:
        """Join quadratics of weights of equal shape, written about anchors, with tensors of a common dtype."""
        gram = torch.stack([each.gram for each in quadratics])
        return cls(*_joined(quadratics, gram), checked=False)

    @property
    def problems(self) -> int:
        return len(self.gram)

    @cached_property
    def blocks(self) -> list[Quadratic]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inner, stiffness = self._cache.envelope_of or (None, 0.0)
        blocks = []
        for i, rows in enumerate(self.parts):
            given = self._cache
            cache = Cache(self.gram[i], given.precision, given.energy[rows], suspect=given.suspect)
            if isinstance(inner, SideBySide):
                cache.envelope_of = inner.blocks[i], stiffness
            anchor = None if self.anchor is None else self.anchor[rows]
            block = self.gram[i], self.cross[rows], self.energy[rows], anchor, self.bound, cache
            blocks.append(Quadratic(*block, checked=False))
        return blocks

    @property
    def norm(self) -> Tensor:
        return self.for_rows(super().norm)[:, None]

    def scale(self) -> Tensor:
        return self.for_rows(_positive(self._diagonal).sqrt())

    def scaled(self, scale: Tensor) -> Self:
        return self._in_units(self.gram, self.by_block(scale)[:, 0])

    @cached_property
    def unit_free(self) -> tuple[Self, Tensor]:
        unit = power_of_two(_positive(self._diagonal).sqrt().double())
        return self._in_units(self.gram.double(), unit), self.for_rows(unit)

    def _in_units(self, gram: Tensor, unit: Tensor) -> Self:
        """Return the quadratic as a function of U = V * unit [e n], in the dtype of `gram`."""
        scale = self.for_rows(unit)
        anchor = None if self.anchor is None else self.anchor * scale
        gram = (gram / unit[:, None]).div_(unit[:, :, None])
        return self._as_precise(gram, self.cross / scale, self.energy.to(gram), anchor)

    @property
    def _diagonal(self) -> Tensor:
        return self.gram.diagonal(dim1=1, dim2=2)

    @property
    def dead(self) -> Tensor:
        return self.for_rows(self._dead)

    @property
    def _dead(self) -> Tensor:
        return (self._diagonal == 0) & (self.by_block(self.cross) == 0).all(1)

    @property
    def factor(self) -> Tensor | None:
        if self._cache.factor is UNKNOWN:
            margin = self.gram.shape[1] * torch.finfo(self.gram.dtype).eps * self._diagonal.amax(1, keepdim=True)
            self._cache.factor = cholesky(self.gram + torch.where(self._dead, 1.0, -margin).diag_embed())
        return self._cache.factor

    @property
    def is_well_conditioned(self) -> bool:
        least = self.gram.shape[1] * torch.finfo(torch.float32).eps * self._diagonal.amax(1)
        factor = self.factor
        return factor is not None and bool((factor.diagonal(dim1=1, dim2=2).amin(1).square() > least).all())

    @property
    def is_sum_of_squares(self) -> bool:
        """Return True if all problems are sums of squares because H is definite."""
        return self.factor is not None and bool((2 * self.inverse_form(self.cross) <= self.energy_and_rounding).all())

    def inverse_form(self, gradient: Tensor) -> Tensor:
        if self._cache.envelope_of is not None:
            return super().inverse_form(gradient)
        if self.factor is None:
            each = zip(self.blocks, self.parts, strict=True)
            return torch.cat([block.inverse_form(gradient[rows]) for block, rows in each])
        solved = torch.linalg.solve_triangular(self.factor, self.by_block(gradient).mT, upper=False)
        price = solved.square_().sum(1).flatten() / 2
        return torch.where(((gradient != 0) & self.dead).any(1), inf, price)


def joined(problems: Sequence[Problem]) -> Problem | None:
    """Return problems of equal shape as one: of their Gram matrix or matrices; None where they are no rows."""
    quadratics, penalty = [problem.quadratic for problem in problems], _joined_penalty(problems)
    if penalty is None:
        return None
    if any((each.anchor is None) != (quadratics[0].anchor is None) for each in quadratics):
        quadratics = [q if q.anchor is not None else q.at(torch.zeros_like(q.cross), q.cross) for q in quadratics]
    gram = quadratics[0].gram
    if any(each.gram is not gram for each in quadratics):
        return None if len(gram) ** 2 * len(problems) > LARGEST else Problem(SideBySide.of(quadratics), penalty)
    cross, energy, anchor, bound, cache = _joined(quadratics, gram)[1:]
    cache.problems = len(quadratics)
    return Problem(Quadratic(gram, cross, energy, anchor, bound, cache, checked=False), penalty)


def _joined(quadratics: Sequence[Quadratic], gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, Cache]:
    cross, energy = (torch.cat([getattr(each, name) for each in quadratics]) for name in ("cross", "energy"))
    anchors = [each.anchor for each in quadratics if each.anchor is not None]
    given = torch.cat([each._cache.energy for each in quadratics])
    suspect = any(each._cache.suspect for each in quadratics)
    cache = Cache(gram, max(each._cache.precision for each in quadratics), given, suspect=suspect)
    return gram, cross, energy, torch.cat(anchors) if anchors else None, None, cache


def _joined_penalty(problems: Sequence[Problem]) -> AbstractPenalty | None:
    """Return the penalty of all rows; None unless all are convex sums over entries, of one kind."""
    penalties, like = [problem.penalty for problem in problems], problems[0].quadratic.cross
    kinds, first = {type(penalty) for penalty in penalties}, penalties[0]
    if len(kinds) > 1 or not (isinstance(first, Elementwise) and first.is_convex and is_dataclass(first)):
        return None
    every = copy(first)
    for name in (field.name for field in fields(first)):
        values = [getattr(penalty, name) for penalty in penalties]
        if all(isinstance(value, float | int) and value == values[0] for value in values):
            continue
        exact = [v if isinstance(v, Tensor) else like.new_tensor(v, dtype=torch.float64) for v in values]
        object.__setattr__(every, name, torch.cat([value.to(like.device).expand_as(like) for value in exact]))
    return every


def _positive(diagonal: Tensor) -> Tensor:
    return torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
