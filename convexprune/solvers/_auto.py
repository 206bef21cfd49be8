"""The solver of `solve` by default: the fastest for the penalty and the number of weights that are not zero."""

import sys
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from convexprune._device.capabilities import is_host
from convexprune._setting_types import Count, NotNegative
from convexprune.core import AbstractPenalty, Problem, Support
from convexprune.errors import UnsupportedError
from convexprune.solvers._admm import ADMM
from convexprune.solvers._base import AbstractSolver, Solution, Status
from convexprune.solvers._cg import ConjugateGradient
from convexprune.solvers._fista import FISTA
from convexprune.solvers._working_set import WorkingSet


@dataclass(frozen=True)
class Auto(AbstractSolver):
    """A choice among the solvers; `solution.solver` names the choice and the reason.

    For L1 and the elastic net scikit-learn's coordinate descent wins while rows have at most n / 3 non-zero weights on
    average, more if there are few rows. It is taken where a program has imported it: the import takes 150 MB. Else
    working sets win up to n^1.5 / 200 weights: 17, 65 and 250 at n = 256, 576 and 1,536. Beyond, and for all other
    convex penalties, ADMM goes on. FISTA was at most 1.9 times as fast as ADMM, and up to 3 times slower.

    Args:
        tolerance: the requested relative gap.
        max_iterations: the largest number of iterations of the chosen solver.
    """

    batches = "stacks"

    tolerance: NotNegative = 1e-4
    max_iterations: Count = 5000

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """Every penalty has a solver."""
        return (AbstractPenalty,)

    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`."""
        penalty, limits = problem.penalty, (self.tolerance, self.max_iterations)
        if isinstance(penalty, Support):
            return _because(ConjugateGradient(*limits), "cg: the support is fixed", problem, start)
        if not penalty.is_convex:
            return _because(FISTA(*limits), "fista: every step goes down", problem, start)
        if isinstance(penalty, WorkingSet().penalties) and problem.quadratic.gram.ndim == 2:
            first = self._sparse(problem, start)
            if first.status not in (Status.ITERATION_LIMIT, Status.UNCONFIRMED):
                return first
            second = _because(ADMM(*limits), "admm: many weights are not zero", problem, first.weight)
            return min(second, first, key=lambda each: each.certificate.relative_gap)
        return _because(ADMM(*limits), f"admm: the penalty is {type(penalty).__name__}", problem, start)

    def _sparse(self, problem: Problem, start: Tensor | None) -> Solution:
        m, n = problem.shape
        if "sklearn.linear_model" in sys.modules and is_host(problem.quadratic.cross.device):
            from convexprune.solvers._sklearn import ScikitLearn

            with suppress(UnsupportedError):
                descent = ScikitLearn(self.tolerance, largest=n / 3 * (1 + 4 / m))
                return _because(descent, "sklearn: few weights are not zero", problem, start)
        sets = WorkingSet(self.tolerance, min(self.max_iterations, 100), max(16.0, n**1.5 / 200 * (1 + 4 / m)))
        return _because(sets, "working-set: few weights are not zero", problem, start)


def _because(solver: AbstractSolver, reason: str, problem: Problem, start: Tensor | None) -> Solution:
    solution = solver.solve(problem, start)
    return replace(solution, solver=reason, parts=tuple(replace(part, solver=reason) for part in solution.parts))
