"""The production solvers against the oracles, on blocks of real layer problems small enough for the oracles."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from convexprune.core import L1, Problem, Quadratic, Support
from convexprune.pruners import LayerProblem
from convexprune.solvers import AbstractSolver, make_solver

EXACT = 1e-8  # the gap to which the production solver is run for the comparison
NEGLIGIBLE = 1e-9
"""Of the target's energy: an objective below this is an exact fit, of which rounding decides, and counts as this."""


@dataclass(frozen=True)
class Solve:
    """The answer of a solver to a problem; `difference` and `relative_gap` are relative to the objective.

    If the target is fitted all but exactly, as on fewer tokens than inputs, both are relative to `NEGLIGIBLE` of its
    energy.
    """

    solver: str
    objective: float  # q + p at the answer
    difference: float  # the objective less the least objective of all solvers
    relative_gap: float
    kkt_residual: float
    seconds: float


@dataclass(frozen=True)
class SolvedProblem:
    """A problem of an operator, and its answers: of production by default and to the end, and of oracles."""

    operator: str
    penalty: str  # "L1" or "support"
    rows: int
    columns: int
    solves: tuple[Solve, ...]

    def faults(self, tolerance: float, gap: float) -> Iterator[str]:
        """Yield missed tolerances; `gap` is the largest accepted gap of the production solver at its default."""
        for solve in self.solves[1:]:
            if not solve.difference <= tolerance:
                yield f"{solve.solver}: the objective is {solve.difference:.1e} above the least"
        if not self.solves[0].relative_gap <= gap:
            yield f"{self.solves[0].solver}: the gap at default settings is {self.solves[0].relative_gap:.1e}"


def block(problem: LayerProblem, columns: int, generator: torch.Generator) -> tuple[Quadratic, torch.Tensor]:
    """Return a pruning problem in which only some columns, or groups of an n:m pattern, move, and the rest is dense."""
    n = problem.weight.shape[1]
    width = problem.pattern.block
    groups = torch.randperm(n // width, generator=generator)[: max(1, columns // width)].sort().values
    chosen = (groups[:, None] * width + torch.arange(width)).flatten()
    q = problem.quadratic.double
    assert q.anchor is not None
    return q.columns(chosen), chosen


def block_problems(q: Quadratic, problem: LayerProblem, kept: torch.Tensor) -> dict[str, Problem]:
    """Return the convex problems of a block without damping: reweighted L1 as of `convex`, and the refit on a
    support.
    """
    assert q.anchor is not None
    scale = q.scale()
    scores = q.anchor.abs() * scale
    threshold = problem.pattern.threshold(scores).clamp_min(torch.finfo(scores.dtype).tiny)
    strength = threshold * torch.exp(-(scores / threshold).square()) * scale
    return {"L1": Problem(q, L1(strength)), "support": Problem(q, Support(kept))}


def production(penalty: str) -> dict[str, AbstractSolver]:
    """Return the production solver of a penalty, "L1" or "support", at its default and run to the end."""
    if penalty == "L1":
        return {"fista": make_solver("fista"), "fista, 1e-8": make_solver("fista", tolerance=EXACT,
                                                                          max_iterations=20_000)}  # fmt: skip
    return {"cg": make_solver("cg"), "cg, 1e-8": make_solver("cg", tolerance=EXACT, max_iterations=1000)}


def oracles() -> dict[str, AbstractSolver]:
    """Return three foreign solvers, by name."""
    return {
        "cvxpy, Clarabel": make_solver("cvxpy", engine="CLARABEL"),
        "cvxpy, OSQP": make_solver("cvxpy", engine="OSQP"),
        "scipy": make_solver("scipy"),
    }


def solve_by_all(name: str, penalty: str, problem: Problem) -> SolvedProblem:
    """Solve a problem by the production solver of its penalty and by the oracles."""
    solutions = {key: solver.solve(problem) for key, solver in (production(penalty) | oracles()).items()}
    values = {key: solution.certificate.primal for key, solution in solutions.items()}
    least, energy = min(values.values()), problem.quadratic.target_energy
    exact = max(NEGLIGIBLE * energy, torch.finfo(torch.float64).tiny)
    solves = tuple(
        Solve(
            key,
            values[key],
            (values[key] - least) / max(least, exact),
            solution.certificate.gap / max(values[key], exact),
            solution.certificate.kkt_residual,
            solution.solve_seconds,
        )
        for key, solution in solutions.items()
    )
    return SolvedProblem(name, penalty, *problem.shape, solves)
