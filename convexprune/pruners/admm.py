"""Our ADMM on the problem with the pattern as a constraint: not convex, and the fastest way to a good support."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.pattern import AbstractPattern
from convexprune.pruners.search import AbstractSearch, Found
from convexprune.quadratic import Quadratic


@dataclass(frozen=True)
class ADMM(AbstractSearch):
    """min q(B) subject to B = D, D in the pattern, by the alternating direction method of multipliers.

    With the dense weight A as the anchor of q, the scaled dual U and the penalty rho,

        B = argmin q + rho/2 |B - (D - U)|^2 = A + (G + rho (D - U - A)) (H + rho I)^-1
        D = the largest of B + U that the pattern allows
        U = B + U - D

    B is written as a difference from A: with x* = x, where G = 0, nothing cancels and the product may be computed in a
    short floating-point format. rho grows geometrically from one of `stiffnesses` to the other; (H + rho I)^-1, shared
    by all rows, is computed anew every `every` iterations, where U shrinks in proportion (rho U is the multiplier).

    The constraint is not convex: there is no certificate for the support, only for the refit on it. What is ours,
    against Boza (arXiv 2401.02938) and ALPS: the coordinates, the schedule, the shared Cholesky factor. Forty
    iterations are within a few per cent of 120.
    """

    iterations: int = 120
    stiffnesses: tuple[float, float] = (0.03, 1.0)
    every: int = 4

    @property
    def by_rows(self) -> bool:
        """See `AbstractPruner.by_rows`."""
        return True

    def search(self, quadratic: Quadratic, scale: Tensor, pattern: AbstractPattern) -> Found:
        """See `AbstractSearch.search`: the scores are the last B + U, whose rounding is the last D."""
        assert quadratic.anchor is not None
        anchor, kept = quadratic.anchor, quadratic.anchor
        dual, scores = torch.zeros_like(kept), kept
        rho, inverse = 0.0, quadratic.gram
        for iteration in range(self.iterations):
            if iteration % self.every == 0:
                before, rho = rho, between(self.stiffnesses, iteration / (self.iterations - 1 or 1))
                inverse = quadratic.shifted_inverse(rho)
                dual = dual * (before / rho)
            point = (kept - dual - anchor).mul_(rho).add_(quadratic.cross)
            scores = torch.addmm(anchor, point, inverse).add_(dual)
            kept = scores * pattern.mask(scores.abs())
            dual = scores - kept
        return Found(scores, products=self.iterations)


def between(ends: tuple[float, float], share: float) -> float:
    """The geometric way from one end (share 0) to the other (share 1)."""
    return ends[0] * (ends[1] / ends[0]) ** share
