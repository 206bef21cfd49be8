"""ALPS, for comparison."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._device.precision import bare_product
from convexprune._setting_types import Count, NotNegative, Positive
from convexprune.constraints import Constraint
from convexprune.core import Quadratic
from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, dead_inputs_first
from convexprune.pruners._cost import Cost
from convexprune.pruners._refit import refitted
from convexprune.solvers import AbstractSolver
from convexprune.solvers._cg import ConjugateGradient


@dataclass(frozen=True)
class ALPS(AbstractPruner):
    """Meng et al., arXiv 2406.07831, Algorithm 1 (mazumder-lab/ALPS, alps.py): ADMM on the pattern, then a refit.

    In coordinates where H + damping mean(diag H) I has a unit diagonal, with multiplier V and penalty rho,

        B = (H + rho I)^-1 (H W - V + rho D),   D = pattern(B + V / rho),   V = V + rho (B - D)

    Every `every` iterations rho grows by 1.3, 1.2 or 1.1 if the support has changed in more than 10 %, in more than
    0.5 % of the kept entries, or at all (entries that came and that went both count). It ends when the support has not
    changed, or, after `settled` iterations, in less than 0.03 %, or after `iterations`. As long as rho has never grown,
    a change too small to count divides rho by 5 instead and starts anew. One eigendecomposition serves every rho. The
    refit is ten steps of conjugate gradients on the largest of the last B; without `refit` the last B stays.

    Differences to the authors' code: exact ties; B is written as a difference from the dense weight (the same
    iteration, without cancellation); the scale is sqrt(diag) without the 1e-8; with error correction the target is that
    of the problem (correction=0 is the published method); each operator of a stack has its own penalty schedule. The
    paper's text has a ridge of 0.01 tr H, the code and this 0.01 mean diag H, `damping`. The code's conjugate gradients
    take all ten steps: their stop looks at entries that are zero, too. `rho` is the first penalty.
    """

    cost: ClassVar[Cost] = Cost(10.5, 30.7, 45, 12, 4.0)

    iterations: Count = 300
    rho: Positive = 0.1
    every: Count = 3
    settled: Count = 30
    damping: NotNegative = 0.01
    refit: AbstractSolver | None = field(default_factory=lambda: ConjugateGradient(tolerance=0.0, max_iterations=10))

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        gram = problem.quadratic.gram
        ridge = self.damping * gram.diagonal().mean().expand(len(gram))
        whole = problem.quadratic + Quadratic.damping(problem.weight, ridge)
        scale = whole.scale()
        whole = whole.scaled(scale)
        eigenvalues, vectors = torch.linalg.eigh(whole.gram.double())
        parts, products = [], 0
        for rows, pattern in problem.pattern.parts(len(problem.weight)):
            scores, count = self._admm(whole.rows(rows), eigenvalues, vectors, pattern)
            parts.append((scores, pattern.mask(scores.abs())))
            products = max(products, count)
        scores, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        weight, refits = refitted(whole, mask, scores, self.refit)
        return LayerEdit(weight / scale, mask, refits, other_products=products)

    def _admm(
        self, quadratic: Quadratic, eigenvalues: Tensor, vectors: Tensor, pattern: Constraint
    ) -> tuple[Tensor, int]:
        """Return the last B [m n], and the number of iterations."""

        def inverse(rho: float) -> Tensor:
            return bare_product(vectors / (eigenvalues + rho), vectors.T).to(dense.dtype)

        assert quadratic.anchor is not None
        dense = scores = quadratic.anchor
        mask = known = pattern.mask(dense.abs())
        kept, dual = dense * mask, torch.zeros_like(dense)
        count = dense.numel() - pattern.zeros(*dense.shape)
        rho, grown, iteration = self.rho, False, 0
        solve = inverse(rho)
        while iteration < self.iterations:
            iteration += 1
            scores = dense + bare_product(quadratic.cross - dual + rho * (kept - dense), solve)
            target = scores + dual / rho
            mask = pattern.mask(target.abs())
            kept = target * mask
            dual = dual + rho * (scores - kept)
            if iteration % self.every:
                continue
            change = int((mask ^ known).sum())
            known = mask
            growth = 1.3 if change > 0.1 * count else 1.2 if change > 0.005 * count else 1.1 if change and grown else 0
            if growth:
                rho, grown = min(rho * growth, 1e6), True
            elif grown:
                break  # the support stands still
            else:
                rho /= 5
                if change:
                    kept, dual = dense * pattern.mask(dense.abs()), torch.zeros_like(dense)
            if iteration > self.settled and (not change or change < 0.0003 * count):
                break
            solve = inverse(rho)
        return scores, iteration
