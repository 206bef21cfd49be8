"""A sum of squares of the weight: values, residuals, and everything that follows from a factor of the Gram matrix."""

from dataclasses import InitVar, dataclass, field
from functools import cached_property
from math import inf
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexprune._device.capabilities import has_bfloat16
from convexprune._device.precision import add_product, bare_product
from convexprune.core._arrays import DataFormat, as_tensor
from convexprune.core._consistency import fitting, is_sum_of_squares, symmetric
from convexprune.core._symmetric import cholesky, largest_eigenvalue, rounding_margin
from convexprune.errors import ProblemError

ROOM = 16  # rounding errors for each of n + 64 terms: sums over many tokens have more than one a term
UNKNOWN: Any = ...  # of what was not tried, and a copy or pickle of it is itself: None says that there is none


@dataclass(eq=False)
class Cache:
    """Values computed at most once for quadratics that differ only in the anchor; `UNKNOWN` where None is a value."""

    gram: Tensor
    precision: float  # the rounding error of the given tensors' dtype
    energy: Tensor  # the given one [m]
    envelope_of: "tuple[SumOfSquares, float] | None" = None  # with the stiffness of a Moreau envelope
    target_energies: list[float] | None = None
    is_sum_of_squares: bool | None = None
    is_well_conditioned: bool | None = None
    doubt: float | None = None
    problems: int = 1  # of equal height, whose rows share the Gram matrix
    suspect: bool = False  # a caller gave the tensors, which may then belong to no sum of squares
    factor: Tensor | None = UNKNOWN
    inverse: Any = UNKNOWN

    @cached_property
    def largest_eigenvalue(self) -> float:
        return largest_eigenvalue(self.gram)

    @cached_property
    def gram_of_steps(self) -> Tensor:
        """H [n n] in the dtype for products of steps: bfloat16 if the device has such products, else H."""
        coarse = self.gram.dtype == torch.float32 and has_bfloat16(self.gram.device)
        return self.gram.bfloat16() if coarse else self.gram


@dataclass(frozen=True, eq=False)
class SumOfSquares:
    """The methods of a `Quadratic`, which documents `gram`, `cross`, `energy`, `anchor`, `bound` and `cache`."""

    gram: Tensor
    cross: Tensor
    energy: Tensor
    anchor: Tensor | None = None
    bound: float | None = None
    cache: "Cache | None" = field(default=None, repr=False)
    checked: InitVar[bool] = True
    data: DataFormat | None = field(default=None, kw_only=True)

    def __post_init__(self, checked: bool) -> None:
        names = ("gram", "cross", "energy", "anchor")
        if self.data is None:
            object.__setattr__(self, "data", DataFormat.of(self.cross))
        if np.ndim(self.cross) == 1:  # pyright: ignore[reportArgumentType]
            if isinstance(self.energy, Real):
                object.__setattr__(self, "energy", as_tensor("cross", self.cross).new_tensor([float(self.energy)]))
            for name in names[1:]:
                value = getattr(self, name)
                shape = (1,) if name == "energy" else (1, -1)
                object.__setattr__(self, name, None if value is None else as_tensor(name, value).reshape(shape))
        for name, tensor in zip(names, fitting(*(getattr(self, name) for name in names)), strict=True):
            object.__setattr__(self, name, tensor)
        if checked:
            object.__setattr__(self, "gram", symmetric(self.gram, self.cross, self.energy, self.anchor))
        if self.cache is None:
            cache = Cache(self.gram, torch.finfo(self.energy.dtype).eps, self.energy, suspect=checked)
            object.__setattr__(self, "cache", cache)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n): outputs and inputs of the operator."""
        return self.cross.shape[0], self.cross.shape[1]

    @property
    def parts(self) -> list[slice]:
        """Return the rows of every problem side by side."""
        height = len(self.cross) // self.problems
        return [slice(first, first + height) for first in range(0, len(self.cross), height)]

    @property
    def problems(self) -> int:
        """Return the number e of problems side by side, each of as many rows."""
        return self._cache.problems

    def totals(self, rows: Tensor) -> list[float]:
        """Return the sum over the `rows` [e m] by problem."""
        return [float(rows.sum())] if self.problems == 1 else self.by_block(rows).sum(1).tolist()

    def by_block(self, rows: Tensor) -> Tensor:
        """Split `rows` [e m, ...] by problem: [e m ...]."""
        return rows.unflatten(0, (self.problems, -1))

    def for_rows(self, values: Tensor) -> Tensor:
        """Repeat `values` [e ...] by problem for every row: [e m, ...]."""
        height = len(self.cross) // len(values)
        return values[:, None].expand(len(values), height, *values.shape[1:]).flatten(0, 1)

    @property
    def norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.gram)

    def displacement(self, weight: Tensor) -> Tensor:
        return weight if self.anchor is None else weight - self.anchor

    def residual(self, weight: Tensor) -> Tensor:
        """Return the negative gradient of q, K = G - D H [m n], at `weight` [m n]."""
        return add_product(self.cross, self.displacement(weight), self.gram, alpha=-1)

    def residual_after(self, residual: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return K - (V - V_0) H [m n] after a small step from V_0, where the residual is K, to V.

        The product is in bfloat16 if the device has such products (`has_bfloat16`). Its error is at most 2^-8 of the
        change, small for a small step. Certificates and reports use `residual`.
        """
        gram = self._cache.gram_of_steps
        step = torch.sub(after, before, out=torch.empty_like(after, dtype=gram.dtype))  # rounded as it is written
        change = bare_product(step, gram)
        return torch.sub(residual, change, out=change if change.dtype == residual.dtype else None)

    def values(self, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return q by row [m], not negative, at a weight [m n]; no product is needed if its residual is known."""
        residual = self.residual(weight) if residual is None else residual
        values = self.energy - torch.linalg.vecdot(self.displacement(weight), self.cross + residual)
        return values.clamp_min(0) / 2  # a sum of squares; rounding may say otherwise

    @property
    def lipschitz(self) -> float:
        """Return an upper estimate of H's largest eigenvalue: the bound, or the power method's value."""
        if self.bound is not None:
            return self.bound
        return self._cache.largest_eigenvalue

    def scale(self) -> Tensor:
        """Return sqrt(H_jj) [n], the largest for a dead input: in coordinates V * scale, H has a unit diagonal."""
        diagonal = self.gram.diagonal()
        alive = torch.where(diagonal > 0, diagonal, diagonal.amax())
        return torch.where(alive > 0, alive, 1.0).sqrt()

    @property
    def target_energies(self) -> list[float]:
        """Return the sum of squares at V = 0 by block: the energy of the whole target, a unit for residuals."""
        if self._cache.target_energies is None:
            self._cache.target_energies = self.totals(2 * self.values(torch.zeros_like(self.cross)))
        return self._cache.target_energies

    @property
    def target_energy(self) -> float:
        return sum(self.target_energies)

    @property
    def rounding(self) -> Tensor:
        """Return the resolution of q [m]: four rounding errors of the energy, in the given dtype."""
        return 4 * self._cache.precision * self.resolved

    @property
    def resolved(self) -> Tensor:
        """Return the largest energy [m] whose rounding is in q: the given one, or that about the anchor."""
        return torch.maximum(self._cache.energy.to(self.energy), self.energy)

    @property
    def is_sum_of_squares(self) -> bool:
        """True if H is positive semidefinite and every energy large enough for its cross term, up to rounding.

        Only for a quadratic whose H has a diagonal near 1, or zero (`unit_free`).
        """
        if self._cache.is_sum_of_squares is None:
            least = self.energy_and_rounding
            self._cache.is_sum_of_squares = is_sum_of_squares(self.gram, self.cross, least, self._room, self.factor)
        return self._cache.is_sum_of_squares

    @property
    def energy_and_rounding(self) -> Tensor:
        """Return the energies [m], and what rounding may hide of them in units of the anchor's outputs."""
        unit = self.energy if self.anchor is None else self.energy + self.anchor.square().sum(1)
        return self.energy + self._room * unit

    @property
    def _room(self) -> float:
        """Bound the rounding error of sums, in units of the energy."""
        return ROOM * (self.shape[1] + 64) * self._cache.precision

    @property
    def doubt(self) -> float:
        """Distance of H, in the spectral norm, from the Gram matrix that was rounded to it; 0 for a definite H.

        Rounding makes a singular Gram matrix indefinite. The least shift that makes H definite says by how much, up to
        a factor of four and at least a rounding error. Float64 hides nothing that counts. Only for a quadratic whose H
        has a diagonal near 1, or zero.
        """
        if self._cache.doubt is None:
            shift = 0.0
            if self._cache.precision > torch.finfo(torch.float64).eps and self.factor is None:
                shift, unit = self._cache.precision, torch.ones_like(self.gram[0]).diag()
                while shift < self._room and cholesky(self.gram + shift * unit) is None:
                    shift *= 4
            self._cache.doubt = shift
        return self._cache.doubt

    @property
    def factor(self) -> Tensor | None:
        """Lower triangular F [n n] with F F' <= H, or None if H is not safely positive definite.

        `rounding_margin` reduces the diagonal, so that |F^-1 k|^2 errs upwards. Inputs that are always zero get a
        diagonal of 1, which leaves the rest exact; `inverse_form` handles these inputs.
        """
        if self._cache.factor is UNKNOWN:
            shift = torch.where(self.dead, 1.0, -rounding_margin(self.gram)).to(self.gram)
            self._cache.factor = cholesky(self.gram + shift.diag())
        return self._cache.factor

    @property
    def is_well_conditioned(self) -> bool:
        """True if H, or the H of the function under an envelope, has pivots above the rounding of float32.

        Its least eigenvalue is at most the least pivot, so without such pivots no float32 factor of H exists.
        """
        inner = self if self._cache.envelope_of is None else self._cache.envelope_of[0]
        if inner._cache.is_well_conditioned is None:
            least = len(inner.gram) * torch.finfo(torch.float32).eps * inner.gram.diagonal().amax()
            pivots = None if inner.factor is None else inner.factor.diagonal()
            inner._cache.is_well_conditioned = pivots is not None and bool(pivots.amin().square() > least)
        return inner._cache.is_well_conditioned

    @property
    def dead(self) -> Tensor:
        """Mask the inputs [n] that are always zero. Their weights do not change the objective."""
        return (self.gram.diagonal() == 0) & (self.cross == 0).all(0)

    def inverse_form(self, gradient: Tensor) -> Tensor:
        """Return an upper bound on 1/2 k H^-1 k' by row k; inf where H is not safely positive definite.

        The conjugate of an envelope is the conjugate of the relaxed function plus |k|^2 / (2 stiffness), so that a
        single factorisation serves all envelopes.
        """
        if self._cache.envelope_of is not None:
            inner, stiffness = self._cache.envelope_of
            return inner.inverse_form(gradient) + torch.linalg.vecdot(gradient, gradient) / (2 * stiffness)
        if self.factor is None:
            return torch.where((gradient == 0).all(1), 0.0, inf)
        solved = torch.linalg.solve_triangular(self.factor, gradient.T, upper=False)
        return torch.where(((gradient != 0) & self.dead).any(1), inf, solved.square_().sum(0) / 2)

    def scaled_price(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the cost of the dual point s K: (1 - s)^2 q by row [m]."""
        return (1 - scale).square() * (values + self.rounding)

    def shifted_inverse(self, shift: float) -> Tensor:
        """Return (H + shift I)^-1, by a Cholesky factor."""
        shifted = self.gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor = cholesky(shifted)
        if factor is None:
            raise ProblemError(f"The Gram matrix plus {shift} is not positive definite; it is no Gram matrix.")
        return torch.cholesky_inverse(factor)

    @property
    def _cache(self) -> "Cache":
        assert self.cache is not None
        return self.cache
