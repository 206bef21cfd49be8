"""Penalties of the weight as a matrix: the nuclear norm, and a sum of penalties of blocks of columns."""

from dataclasses import dataclass
from math import inf
from numbers import Real
from operator import index

import torch
from torch import Tensor

from convexprune.core._abstract_penalty import FINITE, AbstractPenalty, checked_strength, require_step
from convexprune.errors import ProblemError


@dataclass(frozen=True, eq=False)
class NuclearNorm(AbstractPenalty):
    """strength times the sum of the singular values of V: few of them are not zero.

    The part of row i in `values` is strength sum_k s_k U_ik^2, of the singular value decomposition U diag(s) W'.

    Args:
        strength: not negative.
    """

    couples_rows = True
    priced = ("strength",)

    strength: float

    def __post_init__(self) -> None:
        wrong = f"The strength of a nuclear norm is {self.strength!r}; it is one number, not negative and finite."
        if not isinstance(self.strength, Real):
            raise ProblemError(wrong)
        object.__setattr__(self, "strength", checked_strength(self.strength, wrong, FINITE))

    def values(self, weight: Tensor) -> Tensor:
        if not bool(weight.isfinite().all()):
            return weight.new_full((len(weight),), inf)
        left, sizes, _ = torch.linalg.svd(weight, full_matrices=False)
        return self.strength * (left.square() @ sizes)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Soft thresholding of the singular values."""
        require_step(step)
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        return left * (sizes - step * self.strength).clamp_min(0) @ right

    def dual_scale(self, dual: Tensor) -> Tensor:
        """strength over the largest singular value."""
        largest = float(torch.linalg.matrix_norm(dual, 2))
        return dual.new_full((len(dual),), self.strength / largest if largest > 0 else inf)


@dataclass(frozen=True, eq=False)
class Blocks(AbstractPenalty):
    """A sum of penalties, each of its own block of columns: p(V) = sum_b p_b(V_:b).

    With `Quadratic.repeated(2)` it states a weight as a sum: `Blocks(((L1(0.1), n), (NuclearNorm(1.0), n)))` is sparse
    plus low rank.

    Args:
        parts: penalties, and the number of columns of each.
    """

    parts: tuple[tuple[AbstractPenalty, int], ...]

    def __post_init__(self) -> None:
        try:
            parts = tuple((p, int(index(width))) for p, width in self.parts)
        except (TypeError, ValueError):
            parts = ()
        object.__setattr__(self, "parts", parts)
        if not parts or not all(isinstance(p, AbstractPenalty) and width > 0 for p, width in parts):
            raise ProblemError("Blocks are pairs of a penalty and a number of columns above 0: ((L1(0.1), 8), ...).")

    @property
    def couples_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if a part couples rows."""
        return any(penalty.couples_rows for penalty, _ in self.parts)

    @property
    def is_convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if all parts are convex."""
        return all(penalty.is_convex for penalty, _ in self.parts)

    def values(self, weight: Tensor) -> Tensor:
        return torch.stack([p.values(w) for p, w in self._each(weight)]).sum(0)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        return torch.cat([p.prox(w, step) for p, w in self._each(weight)], 1)

    def inside(self, weight: Tensor) -> Tensor:
        return torch.cat([p.inside(w) for p, w in self._each(weight)], 1)

    def settled(self, weight: Tensor, eps: float) -> Tensor:
        return torch.cat([p.settled(w, eps) for p, w in self._each(weight)], 1)

    def conjugate(self, dual: Tensor) -> Tensor:
        return torch.stack([p.conjugate(s) for p, s in self._each(dual)]).sum(0)

    def project(self, dual: Tensor) -> Tensor:
        return torch.cat([p.project(s) for p, s in self._each(dual)], 1)

    def dual_scale(self, dual: Tensor) -> Tensor:
        scale = torch.stack([p.dual_scale(s) for p, s in self._each(dual)]).amin(0)
        return scale.amin().expand_as(scale) if self.couples_rows else scale

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor | None:
        each = zip(self._each(weight), self._split(dual), strict=True)
        found = [part for (p, w), s in each if (part := p.subgradient(w, s)) is not None]
        return torch.cat(found, 1) if len(found) == len(self.parts) else None

    def units(self, scale: Tensor) -> Tensor:
        return torch.cat([p.units(s) for (p, _), s in zip(self.parts, self._split(scale), strict=True)], -1)

    def scaled(self, scale: Tensor) -> "Blocks":
        scales = self._split(scale)
        return Blocks(tuple((p.scaled(s), width) for (p, width), s in zip(self.parts, scales, strict=True)))

    def times(self, factor: float) -> "Blocks":
        return Blocks(tuple((p.times(factor), width) for p, width in self.parts))

    def to(self, dtype: torch.dtype) -> "Blocks":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Blocks(tuple((p.to(dtype), width) for p, width in self.parts))

    def rows(self, chosen: slice | Tensor) -> "Blocks":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Blocks(tuple((p.rows(chosen), width) for p, width in self.parts))

    def check(self, shape: tuple[int, int]) -> None:
        if sum(width for _, width in self.parts) != shape[1]:
            raise ProblemError(f"Blocks of {[width for _, width in self.parts]} columns for a weight {list(shape)}.")
        for penalty, width in self.parts:
            penalty.check((shape[0], width))

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split([width for _, width in self.parts], -1)

    def _each(self, tensor: Tensor) -> list[tuple[AbstractPenalty, Tensor]]:
        return [(penalty, part) for (penalty, _), part in zip(self.parts, self._split(tensor), strict=True)]
