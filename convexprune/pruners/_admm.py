"""Our ADMM on the problem with the pattern as a constraint: not convex, and the way to the best supports we know."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._device.kernels import fused, number_like
from convexprune._setting_types import Count, Ends, NotNegative, between
from convexprune.constraints import Constraint
from convexprune.core import Quadratic
from convexprune.pruners._cost import Cost
from convexprune.pruners._search import AbstractSearch, Found


@dataclass(frozen=True)
class ADMM(AbstractSearch):
    """min q(B) subject to B = D, D in the pattern, by the alternating direction method of multipliers.

    With the scaled dual U, the penalty rho and the relaxation a (Boyd et al. 2011, sections 3.1.1 and 3.4.3),

        B = argmin q + rho/2 |B - P|^2,   P = D - U
        S = a B + (1 - a) D + U
        D = the largest of S that the pattern allows,   U = S - D

    B is P after a step 1 / rho along the negative gradient K of q's Moreau envelope of stiffness rho, so that
    S = D + (1 - a) U + a K / rho. Between two values of rho, K follows the change of P (`Quadratic.residual_after`).

    The constraint is not convex: only the refit on the support has a certificate. What is ours, against Boza (arXiv
    2401.02938) and ALPS: the coordinates, the schedule, the relaxation, the shared Cholesky factor.

    Args:
        iterations: how many.
        stiffnesses: rho grows geometrically, from the first of these towards the second at the last iteration.
        every: rho grows every so many iterations only, so it ends below the second: at 0.89 with the defaults. U
            shrinks in proportion (rho U is the multiplier).
        relaxation: a; below one it ends in better supports (lab/tried.md).
    """

    side_by_side: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(7.3, 28.2, 125, 18, 2.3)

    iterations: Count = 80
    stiffnesses: Ends = (0.1, 1.0)
    every: Count = 5
    relaxation: NotNegative = 0.7

    def search(self, quadratic: Quadratic, pattern: Constraint) -> Found:
        """Return the last S as scores; rounding S gives the last D."""
        assert quadratic.anchor is not None
        kept = scores = quadratic.anchor
        dual = torch.zeros_like(kept)
        rho, products = 0.0, 0
        for numbers in (chunk.tolist() for chunk in torch.arange(self.iterations).split(self.every)):
            before, rho = rho, between(self.stiffnesses, numbers[0] / (self.iterations - 1 or 1))
            relaxed = quadratic.envelope(rho)
            dual = dual * (before / rho)
            point = kept - dual
            slope = relaxed.residual(point)
            factors = self.relaxation / rho, 1 - self.relaxation
            for number in numbers:
                if number > numbers[0]:
                    last, point = point, kept - dual
                    slope = relaxed.residual_after(slope, last, point)
                scores = _scores(kept, slope, dual, *(number_like(c, kept) for c in factors))
                kept, dual = _parts(scores, pattern.mask(scores.abs()))
            products += 1 + len(numbers)  # one is the envelope's
        return Found(scores, products=products)


@fused
def _scores(kept: Tensor, slope: Tensor, dual: Tensor, reach: Tensor, rest: Tensor) -> Tensor:
    """S = D + a / rho K + (1 - a) U."""
    return torch.addcmul(kept, slope, reach).addcmul_(dual, rest)


@fused
def _parts(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    kept = scores * mask
    return kept, scores - kept
