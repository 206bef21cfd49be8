"""A quadratic about a weight whose certificate takes no product in float64, and still is a bound.

The residual K there is known up to an error E with |E_ij| <= e_i, the inverse by a factor of float32, F F' <= H - l I.
With any y in place of H^-1 k, and r = k - y H,

    k H^-1 k'  =  <k, y> + <r, y> + r H^-1 r'  <=  <k, y> + <r, y> + |r|^2 / l

so that the factor's rounding decides how tight the bound is, not whether it holds. E adds at most sqrt(n / l) e_i to a
distance in the norm of H^-1.
"""

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from convexprune._device.precision import Parts, error_of_parts, product_of_parts
from convexprune.core._quadratic import Quadratic
from convexprune.core._symmetric import cholesky, rounding_margin

OF_RESIDUAL, OF_PRICE = 6, 4
"""Parts of six bits: what they leave out is 3e-11 and 1e-7 of the factors, times the number of inputs."""


@dataclass(frozen=True, eq=False)
class Inverse:
    """Factor and least eigenvalue of H [n n], computed once."""

    parts: Parts
    lower: Tensor  # F [n n], float32
    least: float  # l; except for dead inputs H has no eigenvalue below

    @classmethod
    def of(cls, quadratic: Quadratic) -> "Inverse | None":
        """Return the inverse of a quadratic in units of a diagonal near 1; None if H is not definite in float32."""
        gram = quadratic.gram.float()
        least = rounding_margin(gram)
        factor = cholesky(gram + torch.where(quadratic.dead, 1.0, -2 * least).to(gram).diag())
        return None if factor is None else cls(Parts.of(quadratic.gram, OF_RESIDUAL, 0), factor, least)


@dataclass(frozen=True, eq=False)
class InParts(Quadratic):
    """A quadratic, to be certified at a single weight V [m n]."""

    inverse: Inverse = field(kw_only=True)
    error: Tensor = field(kw_only=True)  # e [m], of the residual at V
    known: Tensor = field(kw_only=True)  # the residual at V [m n]
    moved: Tensor = field(kw_only=True)  # |V - A| summed over rows [m]

    @classmethod
    def about(cls, quadratic: Quadratic, weight: Tensor, inverse: Inverse) -> "InParts":
        displacement = quadratic.displacement(weight)
        left = Parts.of(displacement, OF_RESIDUAL, 1)
        known = quadratic.cross - product_of_parts(left, inverse.parts, OF_RESIDUAL)
        error, moved = error_of_parts(left, inverse.parts, OF_RESIDUAL)[:, 0], displacement.abs().sum(1)
        tensors = quadratic.gram, quadratic.cross, quadratic.energy, quadratic.anchor, quadratic.bound, quadratic.cache
        return cls(*tensors, False, inverse=inverse, error=error, known=known, moved=moved)

    def residual(self, weight: Tensor) -> Tensor:
        return self.known

    def values(self, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return an upper bound of q by row [m] at V."""
        return super().values(weight, self.known) + self.error * self.moved / 2

    @property
    def rounding(self) -> Tensor:
        """Return the resolution of q [m], including the error of the residual."""
        return super().rounding + self.error * self.moved

    @property
    def factor(self) -> Tensor | None:
        return self.inverse.lower

    @property
    def is_well_conditioned(self) -> bool:
        return True

    @property
    def is_sum_of_squares(self) -> bool:
        """Return True if every energy is large enough for its cross term, up to rounding; H is definite."""
        return bool((2 * self._price(self.cross) <= self.energy_and_rounding).all())

    def inverse_form(self, gradient: Tensor) -> Tensor:
        """Bound 1/2 k H^-1 k' from above by row k, with the error of the residual."""
        return (self._price(gradient).sqrt() + self._blur).square()

    def scaled_price(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the cost of the dual point s K, where s K is off by s E."""
        root = (1 - scale).abs() * (values + self.rounding).sqrt()
        return (root + scale * self._blur).square()

    @property
    def _blur(self) -> Tensor:
        """Bound sqrt(1/2 E H^-1 E') from above by row [m]."""
        return self.error * (len(self.gram) / (2 * self.inverse.least)) ** 0.5

    def _price(self, gradient: Tensor) -> Tensor:
        """Bound 1/2 k H^-1 k' from above by row k [m]."""
        about = torch.cholesky_solve(gradient.float().T, self.inverse.lower).T.double()
        left = Parts.of(about, OF_PRICE, 1)
        rest = gradient - product_of_parts(left, self.inverse.parts, OF_PRICE)
        error = error_of_parts(left, self.inverse.parts, OF_PRICE)[:, 0]
        length = torch.linalg.vector_norm(rest, dim=1) + error * len(self.gram) ** 0.5
        twice = torch.linalg.vecdot(gradient + rest, about) + error * about.abs().sum(1)
        price = (twice + length.square() / self.inverse.least).clamp_min(0) / 2
        return torch.where(((gradient != 0) & self.dead).any(1), inf, price)
