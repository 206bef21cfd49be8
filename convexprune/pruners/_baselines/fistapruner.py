"""FISTAPruner as published, for comparison."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from convexprune._setting_types import Count, NotNegative, Positive
from convexprune.core import L1, Problem
from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, dead_inputs_first
from convexprune.pruners._baselines.scores import Wanda
from convexprune.pruners._baselines.sparsegpt import SparseGPT
from convexprune.pruners._cost import Cost
from convexprune.solvers import Solution
from convexprune.solvers._fista import FISTA

WARM_STARTS: dict[str, AbstractPruner] = {"sparsegpt": SparseGPT(), "wanda": Wanda()}


@dataclass(frozen=True)
class FISTAPruner(AbstractPruner):
    """Zhao et al., arXiv 2408.03728, Algorithm 1: a few FISTA steps on the LASSO, rounding, bisection on the strength.

    From the best rounded weight so far, at first that of `warm_start`, `iterations` steps of plain FISTA (no scaling,
    no restart, Eq. 4), then the smallest magnitudes are set to zero (section 3.2). With E = |V_rounded X* - W X|_F and
    E_round = E - |V X* - W X|_F, the `strength` is raised if E_round / E > `ratio`, else lowered, by bisection of
    [0, `largest_strength`] (Eq. 8). It ends after `patience` rounds in which E has not decreased by a share of
    `improvement`. Strengths are in units of the sum over tokens, as in the paper. No damping, no refit.

    The defaults are the paper's settings for OPT. For LLaMA it has improvement=1e-3 and warm_start="wanda", which take
    a tenth of the products and end with a higher error. Differences: the authors published no code; the initial
    strength, the interval, `improvement` and the exact form of E_round are reconstructed from reviews; the stop on a
    small step inside the 20 is left out; each operator of a stack has its own bisection, as in the paper.
    """

    cost: ClassVar[Cost] = Cost(5.7, 12.9, 126, 2, 3.0, apart=12.9)

    warm_start: Literal["sparsegpt", "wanda"] = "sparsegpt"
    iterations: Count = 20
    ratio: NotNegative = 0.3
    patience: Count = 3
    improvement: NotNegative = 1e-6
    strength: Positive = 1e-5
    largest_strength: Positive = 1e6

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        parts = [self._prune(operator) for operator in problem.operators()]
        solutions = tuple(s for part in parts for s in part.solutions)
        weight, mask = torch.cat([p.weight for p in parts]), torch.cat([p.mask for p in parts])
        return LayerEdit(weight, mask, solutions, other_products=max(p.other_products for p in parts))

    def _prune(self, problem: LayerProblem) -> LayerEdit:
        first = WARM_STARTS[self.warm_start].prune(problem)
        best, mask, error = first.weight, first.mask, _norm(problem, first.weight)
        solver = FISTA(
            tolerance=0, max_iterations=self.iterations, check_every=self.iterations + 1, scale=False, restart=False
        )
        low, high, strength, stale = 0.0, self.largest_strength, self.strength, 0
        solutions: list[Solution] = []
        while stale < self.patience:
            penalty = L1(strength / problem.moments.tokens)
            solution = solver.solve(Problem(problem.quadratic, penalty), best)
            solutions.append(solution)
            kept = problem.pattern.mask(solution.weight.abs())
            rounded = solution.weight * kept
            total = _norm(problem, rounded)
            share = (total - _norm(problem, solution.weight)) / total if total > 0 else 0.0
            low, high = (strength, high) if share > self.ratio else (low, strength)
            strength = (low + high) / 2
            stale = 0 if error - total > self.improvement * error else stale + 1
            if total < error:
                best, mask, error = rounded, kept, total
        return LayerEdit(best, mask, tuple(solutions), other_products=1 + 2 * len(solutions))  # of the errors


def _norm(problem: LayerProblem, weight: Tensor) -> float:
    """|V X* - W X|_F over sqrt(tokens)."""
    return float(problem.squared_error(weight).sum().sqrt())
