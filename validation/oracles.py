"""The production solvers against the oracles, on blocks of real layer problems small enough for the oracles."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from convexprune.pattern import SemiStructured
from convexprune.penalty import L1, Support
from convexprune.problem import Problem
from convexprune.pruners import PruningProblem
from convexprune.quadratic import Quadratic
from convexprune.solvers import AbstractSolver, make_solver

EXACT = 1e-8  # the gap to which the production solver is run for the comparison


@dataclass(frozen=True)
class Solve:
    """One solver's answer to one problem: objective, relative excess over the least found, certificate, seconds."""

    solver: str
    objective: float
    difference: float
    relative_gap: float
    kkt_residual: float
    seconds: float


@dataclass(frozen=True)
class SolvedProblem:
    """One problem [rows columns] of an operator, and what every solver made of it; the production solver first.

    The first answer is the production solver's at its default tolerance, the second the same at a gap of 1e-8.
    """

    operator: str
    penalty: str
    rows: int
    columns: int
    solves: tuple[Solve, ...]

    def faults(self, tolerance: float, gap: float) -> Iterator[str]:
        """What misses: objectives that differ by more than `tolerance`, a default gap above `gap`."""
        for solve in self.solves[1:]:
            if not solve.difference <= tolerance:
                yield f"{solve.solver}: the objective is {solve.difference:.1e} above the least"
        if not self.solves[0].relative_gap <= gap:
            yield f"{self.solves[0].solver}: the gap at default settings is {self.solves[0].relative_gap:.1e}"


def block(problem: PruningProblem, columns: int, generator: torch.Generator) -> tuple[Quadratic, torch.Tensor]:
    """The problem when only some columns may move and the others stay dense: its quadratic, and the columns drawn.

    Columns are drawn one by one, or for an n:m pattern in whole groups.
    """
    n = problem.weight.shape[1]
    width = problem.pattern.group if isinstance(problem.pattern, SemiStructured) else 1
    groups = torch.randperm(n // width, generator=generator)[: max(1, columns // width)].sort().values
    chosen = (groups[:, None] * width + torch.arange(width)).flatten()
    q = problem.quadratic.double
    assert q.anchor is not None
    return q.columns(chosen), chosen


def block_problems(q: Quadratic, problem: PruningProblem, kept: torch.Tensor) -> dict[str, Problem]:
    """The two convex problems of the pruner on a block: reweighted L1 as on its path, and the refit on a support.

    `kept` [rows columns] marks the non-zeros of the pruned weight.
    """
    assert q.anchor is not None
    scale = q.scale()
    scores = q.anchor.abs() * scale
    threshold = problem.pattern.threshold(scores).clamp_min(torch.finfo(scores.dtype).tiny)
    strength = threshold * torch.exp(-(scores / threshold).square()) * scale
    return {"L1": Problem(q, L1(strength)), "support": Problem(q, Support(kept))}


def production(penalty: str) -> dict[str, AbstractSolver]:
    """The production solver of a penalty, at its default and run to the end."""
    if penalty == "L1":
        return {"fista": make_solver("fista"), "fista, 1e-8": make_solver("fista", tolerance=EXACT,
                                                                          max_iterations=20_000)}  # fmt: skip
    return {"cg": make_solver("cg"), "cg, 1e-8": make_solver("cg", tolerance=EXACT, max_iterations=1000)}


def oracles() -> dict[str, AbstractSolver]:
    """Three foreign solvers."""
    return {
        "cvxpy, Clarabel": make_solver("cvxpy", engine="CLARABEL"),
        "cvxpy, OSQP": make_solver("cvxpy", engine="OSQP"),
        "scipy": make_solver("scipy"),
    }


def solve_by_all(name: str, penalty: str, problem: Problem) -> SolvedProblem:
    """Solve one problem by the production solver and the oracles."""
    solutions = {key: solver.solve(problem) for key, solver in (production(penalty) | oracles()).items()}
    values = {key: solution.certificate.primal for key, solution in solutions.items()}
    least = min(values.values())
    unit = max(least, torch.finfo(torch.float64).tiny)
    solves = tuple(
        Solve(
            key,
            values[key],
            (values[key] - least) / unit,
            solution.certificate.relative_gap,
            solution.certificate.kkt_residual,
            solution.solve_seconds,
        )
        for key, solution in solutions.items()
    )
    return SolvedProblem(name, penalty, *problem.shape, solves)
