"""The perspective pruner: one certified convex problem in which non-zeros are paid by their number, and a refit."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from convexprune.bound import budget
from convexprune.errors import PruningError
from convexprune.penalty import ReverseHuber, Support
from convexprune.problem import Problem
from convexprune.pruners.base import AbstractPruner, Pruned, PruningProblem, dead_inputs_first
from convexprune.pruners.refit import refitted
from convexprune.quadratic import Quadratic
from convexprune.relaxation import Relaxed, relax
from convexprune.setting_types import Count, NotNegative
from convexprune.solvers import AbstractSolver, Solution, make_solver, solve
from convexprune.solvers.base import require_penalty
from convexprune.solvers.cg import ConjugateGradient
from convexprune.split import first_split, fit_split, safe_split


@dataclass(frozen=True)
class Perspective(AbstractPruner):
    """The relaxation whose value bounds every pruning from below (see `convexprune.bound`), rounded and refitted.

    With a split 0 < B <= H of the damped Gram matrix, the price mu of a non-zero at which the shares z of a line sum to
    what the pattern keeps is found by `rounds` of `iterations`; then `solver` solves, at that price,

        min_V  q(V) - 1/2 sum_ij B_ij V_ij^2 + ReverseHuber(B, mu)(V)

    which is convex. The pattern keeps the entries with the largest |V| / sqrt(2 mu / B), which is the share z of a
    non-zero where it is below one, and `refit` finds their values (None: they stay). `margin` is the
    share of the split that is given back, so that H - B is well away from singular. Slower than method="convex" and
    worse by some percent; it is the convex problem that is nearest to pruning itself.

    Raises:
        UnsupportedError: `solver` does not take the reverse Huber penalty, or `refit` a support.
    """

    solver: AbstractSolver = field(default_factory=lambda: make_solver("fista"))
    refit: AbstractSolver | None = field(default_factory=ConjugateGradient)
    damping: NotNegative = 0.03
    rounds: Count = 5
    iterations: Count = 40
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        AbstractPruner.__post_init__(self)
        require_penalty(self.solver, ReverseHuber)
        if self.refit is not None:
            require_penalty(self.refit, Support)

    @dead_inputs_first
    def prune(self, problem: PruningProblem) -> Pruned:
        """See `AbstractPruner.prune`.

        Raises:
            PruningError: the damped Gram matrix is not positive definite.
        """
        diagonal = problem.scale.square()
        damped = problem.quadratic.double + Quadratic.damping(problem.weight, self.damping * diagonal).double
        q = damped.scaled(problem.scale.double())
        assert q.anchor is not None
        first = first_split(q.gram)
        if first is None:
            raise PruningError(f"The Gram matrix is not positive definite with damping {self.damping}: raise it.")
        solutions, masks, row = [], [], 0
        for operator in problem.operators():
            rows = slice(row, row := row + len(operator.weight))
            solution, mask = self._support(q.rows(rows), operator, *first)
            solutions.append(solution)
            masks.append(mask)
        mask = torch.cat(masks)
        weight, refits = refitted(q, mask, torch.cat([s.weight for s in solutions]), self.refit)
        weight = (weight / problem.scale).to(problem.weight)
        return Pruned(weight, mask, (*solutions, *refits), {"damping": self.damping})

    def _support(
        self, q: Quadratic, operator: PruningProblem, inverse: Tensor, split: Tensor
    ) -> tuple[Solution, Tensor]:
        """The certified relaxation, and the mask of what it keeps."""
        assert q.anchor is not None
        start = q.anchor * operator.pattern.mask(q.anchor.abs())
        lines, kept = budget(operator.pattern, start)
        found = Relaxed.at(q.anchor)
        for number in range(self.rounds):
            before = split.expand(q.shape)
            found = relax(q, inverse, before, found, lines, kept, self.iterations)
            gain = found.gain.mean(0)
            split = fit_split(q.gram, split, gain / gain.mean().clamp_min(1e-300), 0.1 * 0.4**number)
            found = found.moved(before, split)
        before, split = split, safe_split(q.gram, split[None])[0] * (1 - self.margin)
        found = found.moved(before, split)
        found = relax(q, inverse, split.expand(q.shape), found, lines, kept, self.iterations)
        weight, price = found.weight, found.cost
        prices = price.expand(len(price), weight.numel() // len(price)).reshape(q.shape)
        solution = solve(self.solver, Problem(separated(q, split), ReverseHuber(split, prices)), weight)
        share = solution.weight.abs() * (split / prices.clamp_min(torch.finfo(split.dtype).tiny)).sqrt()
        return solution, operator.pattern.mask(share)


def separated(q: Quadratic, split: Tensor) -> Quadratic:
    """q(V) - 1/2 sum_ij B_j V_ij^2, plus the constant that makes it a sum of squares; the split [n] is below H."""
    gram = q.gram - split.diag()
    cross = q.cross if q.anchor is None else q.cross + split * q.anchor
    rest = Quadratic(gram, cross, q.energy, q.anchor, checked=False)
    assert rest.factor is not None, "the split is below the Gram matrix by a margin"
    energy = torch.linalg.solve_triangular(rest.factor, cross.T, upper=False).square().sum(0)
    return Quadratic(gram, cross, energy, q.anchor, checked=False)
