"""The smooth term: a convex quadratic of the weight whose Gram matrix all rows share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from convexprune._device.precision import product
from convexprune.core._arrays import Array, DataFormat, as_floats, require_type, second_moments
from convexprune.core._sum_of_squares import Cache, SumOfSquares
from convexprune.core._symmetric import power_of_two
from convexprune.errors import ProblemError


@dataclass(frozen=True, eq=False)
class Quadratic(SumOfSquares):
    """A sum of squares of the weight V [m n], written about an anchor A [m n].

    With D = V - A, gram H [n n] (symmetric, positive semidefinite), cross G [m n] and energy e [m]:

        q(V) = 1/2 tr(D H D') - tr(D G') + 1/2 sum(e)

    Row i is 1/2 |z_i - d_i X|^2 with H = X X', G = Z X', e_i = |z_i|^2: the input X and the target Z are not needed.
    H is what SparseGPT and GPTQ call the Hessian, up to a factor. Everything is computed from the small D, so that
    nothing cancels. Quadratics are closed under addition and non-negative scaling.

    Args:
        gram: H [n n]; all tensors, or NumPy arrays, are float32, or all are float64.
        cross: G [m n], or [n] of one row.
        energy: e [m], or a number.
        anchor: A [m n], the point near which the solution is expected (the dense weight); None is zero.
        bound: an upper bound on H's eigenvalues, if one is known.
        cache: results that are shared with quadratics that write the function about other anchors.
        checked: check cheaply that the tensors can be those of a sum of squares; a certificate checks it in full. False
            is for tensors that were computed from tokens or from a quadratic, because the check stops a GPU.
        data: the kind of arrays that `convexprune.solve` answers in; None is that of `cross`. A sum has the kind of its
            first part, or of the only one with an intercept. If the means of two differ, there is no intercept.
    """

    @classmethod
    def least_squares(cls, inputs: Any, targets: Any, anchor: Array | None = None, intercept: bool = False) -> Self:
        """Return the mean squared error 1/2 mean_t |targets_t - V inputs_t|^2 of a linear map V.

        Args:
            inputs: [tokens n], of torch, NumPy, pandas or scipy.sparse. Only moments [n n] are kept.
            targets: [tokens m]; or [tokens], and then `convexprune.solve` returns a weight [n].
            anchor: a good guess [m n] where the fit is nearly exact. In float32 an error of less than 1e-7 of the
                targets' energy is lost otherwise, and no certificate is small.
            intercept: add a constant to V inputs_t, without a penalty.

        Returns:
            The quadratic of V [m n].
        """
        gram, cross, energy, about, data = second_moments(inputs, targets, anchor, intercept)
        return cls(gram, cross, energy, about, data=data, checked=False)

    @classmethod
    def damping(cls, anchor: Array, strength: Array) -> Self:
        """Return a pull towards the anchor, to be added to a quadratic: 1/2 sum_ij strength_j (V_ij - A_ij)^2.

        Args:
            anchor: A [m n], or [n] of one row.
            strength: [n], not negative.

        Returns:
            The quadratic.

        Raises:
            ProblemError: a strength is negative, or there is not one for each input.
        """
        point, strength = as_floats("anchor", anchor), as_floats("strength", strength)
        if strength.ndim != 1 or strength.shape != point.shape[-1:]:
            raise ProblemError(f"`strength` is {list(strength.shape)}; needed is one for each input, [n].")
        if not bool((strength >= 0).all()):
            raise ProblemError(f"Damping must not be negative; the least entry is {float(strength.min()):.3g}.")
        zero = torch.zeros_like(point)
        return cls(torch.diag(strength), zero, zero[..., 0], point, data=DataFormat.of(anchor), checked=False)

    def scaled(self, scale: Tensor) -> Self:
        """Return the quadratic as a function of U = V * `scale` [n], positive."""
        if bool((scale == 1).all()):
            return self  # and what is cached stays
        anchor = None if self.anchor is None else self.anchor * scale
        tensors = (self.gram / scale).div_(scale[:, None]), self.cross / scale, self.energy, anchor
        return self._as_precise(*tensors)

    @cached_property
    def double(self) -> Self:
        """Return the quadratic in float64, for certificates."""
        if self.gram.dtype == torch.float64:
            return self
        anchor = None if self.anchor is None else self.anchor.double()
        tensors = self.gram.double(), self.cross.double(), self.energy.double(), anchor
        return self._as_precise(*tensors, self.data)

    @cached_property
    def unit_free(self) -> tuple[Self, Tensor]:
        """Return the quadratic in float64 as a function of U = V * scale, and the scale [n], 2^k near sqrt(H_jj).

        Nothing is rounded on the way, and units of inputs and weights do not change the computation.
        """
        scale = power_of_two(self.scale().double())
        gram = self.gram.to(torch.float64, copy=True).div_(scale).div_(scale[:, None])
        anchor = None if self.anchor is None else self.anchor * scale
        tensors = gram, self.cross / scale, self.energy.double(), anchor
        return self._as_precise(*tensors), scale

    @property
    def is_credible(self) -> bool:
        """True if the tensors belong to a sum of squares: computed from tokens, or checked at the first question."""
        return not self._cache.suspect or self.unit_free[0].is_sum_of_squares

    def envelope(self, stiffness: float) -> Self:
        """Return the Moreau envelope  min_U q(U) + stiffness/2 |U - V|^2, again a quadratic of V [m n].

        With R = (H + stiffness I)^-1:  gram s - s^2 R,  cross s G R,  energy e - diag(G R G').  Its eigenvalues lie
        below both H's and `stiffness`, so few iterations solve the problem; the inner U is V + residual(V) / stiffness.
        Splitting the weight in this way is the relaxation of Zheng et al. (arXiv 1807.05411, SR3).

        Args:
            stiffness: positive.

        Returns:
            The quadratic.
        """
        inverse = self.shifted_inverse(stiffness)
        image = product(self.cross, inverse)
        energy = self.energy - torch.linalg.vecdot(image, self.cross)
        gram = inverse.mul_(-(stiffness**2))
        gram.diagonal(dim1=-2, dim2=-1).add_(stiffness)
        tensors = gram, image.mul_(stiffness), energy.clamp_min(0), self.anchor
        relaxed = type(self)(*tensors, bound=stiffness, checked=False)
        relaxed._cache.envelope_of, relaxed._cache.suspect = (self, stiffness), self._cache.suspect
        return relaxed

    def at(self, anchor: Tensor | None, residual: Tensor | None = None) -> Self:
        """Write the function about a new anchor; no product is needed if the residual there is known.

        Args:
            anchor: [m n]; None means zero.
            residual: at `anchor` [m n].

        Returns:
            The quadratic, with a shared cache.
        """
        if anchor is self.anchor:
            return self
        point = torch.zeros_like(self.cross) if anchor is None else anchor
        residual = self.residual(point) if residual is None else residual
        energy = 2 * self.values(point, residual)
        return type(self)(self.gram, residual, energy, anchor, self.bound, self.cache, checked=False, data=self.data)

    def rows(self, chosen: Tensor | slice) -> Self:
        """The quadratic of the rows `chosen` alone: numbers [k], a mask [m] or a slice."""
        anchor = None if self.anchor is None else self.anchor[chosen]
        given = self._cache
        cache = Cache(self.gram, given.precision, given.energy[chosen], suspect=given.suspect, factor=given.factor)
        tensors = self.gram, self.cross[chosen], self.energy[chosen], anchor, self.bound, cache
        return type(self)(*tensors, checked=False, data=self.data and self.data.rows(chosen))

    @property
    def blocks(self) -> "Sequence[Quadratic]":
        """The quadratic of every problem side by side."""
        return [self] if self.problems == 1 else [self.rows(part) for part in self.parts]

    def columns(self, chosen: Tensor) -> Self:
        """Return the quadratic of the inputs `chosen` [k] alone; weights of remaining inputs stay at the anchor."""
        anchor = None if self.anchor is None else self.anchor[:, chosen]
        return self._as_precise(self.gram[chosen][:, chosen], self.cross[:, chosen], self.energy, anchor)

    def repeated(self, times: int) -> Self:
        """Return the quadratic of `times` weights side by side [V_1 V_2 ...], a function of their sum, about zero.

        Args:
            times: a whole number above 0.

        Returns:
            The quadratic of a weight [m times n].

        Raises:
            ProblemError: `times` is no such number.
        """
        if not isinstance(times, int | np.integer) or times is True or times < 1:
            raise ProblemError(f"times={times!r}. Accepted: a whole number above 0.")
        at = self.at(None)
        tensors = at.gram.repeat(times, times), at.cross.repeat(1, times), at.energy, None
        return self._as_precise(*tensors, self.data and self.data.repeated(times))

    def _as_precise(
        self, gram: Tensor, cross: Tensor, energy: Tensor, anchor: Tensor | None, data: DataFormat | None = None
    ) -> Self:
        """Return a quadratic with the rounding errors of this quadratic's given tensors."""
        given = self._cache
        cache = Cache(gram, given.precision, given.energy, problems=given.problems, suspect=given.suspect)
        return type(self)(gram, cross, energy, anchor, cache=cache, checked=False, data=data)

    def __add__(self, other: Self) -> Self:
        require_type(other, Quadratic)
        if other.shape != self.shape:
            raise ProblemError(f"Quadratics of weights {list(self.shape)} and {list(other.shape)} have no sum.")
        other = other.at(self.anchor)
        tensors = self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.anchor
        total = type(self)(*tensors, checked=False, data=self.data and self.data.joined(other.data))
        total._cache.suspect = self._cache.suspect or other._cache.suspect
        total._cache.precision = max(self._cache.precision, other._cache.precision)
        total._cache.energy = self.resolved + other.resolved
        return total

    def __mul__(self, factor: float) -> Self:
        if np.ndim(factor) or not isinstance(factor, Real | Tensor | np.ndarray) or not 0 <= factor < inf:
            raise ProblemError(
                f"A quadratic times {factor!r} is no sum of squares; the factor is a finite number >= 0."
            )
        tensors = self.gram * factor, self.cross * factor, self.energy * factor, self.anchor
        scaled = type(self)(*tensors, checked=False, data=self.data)
        scaled._cache.suspect, scaled._cache.precision = self._cache.suspect, self._cache.precision
        scaled._cache.energy = self.resolved * factor
        return scaled

    __rmul__ = __mul__
