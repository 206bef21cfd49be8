"""The interface of every solver: a convex problem in, a certified solution out."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import inf, isfinite
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convexprune._setting_types import check_settings
from convexprune.core import AbstractPenalty, Certificate, Problem, certify
from convexprune.core._arrays import Shown
from convexprune.core._certificate import certify_each
from convexprune.errors import ProblemError, UnsupportedError

TOLERANCE = 1e-4
"""The relative gap that is asked of a solver which has no `tolerance` of its own: that of ours by default."""


class Status(Enum):
    """The end of a solve, as a sentence; the worst status comes last."""

    SOLVED = "The certificate, of all rows together, meets the tolerance."
    STATIONARY = "The weight is stationary to the tolerance; the penalty is not convex, and a better weight may exist."
    ITERATION_LIMIT = "The iterations ran out first: allow more, loosen the tolerance, or add damping."
    UNCONFIRMED = (
        "The solver says that it is done, the certificate does not meet the tolerance: the data may not resolve it. "
        "Use float64, an anchor near the answer, damping, or a looser tolerance."
    )
    NON_FINITE = "The iterates are no longer finite: the problem has non-finite data, or the step is too long."
    INCONSISTENT = (
        "The problem is no sum of squares: its Gram matrix is indefinite, or an energy too small for its cross term."
    )
    FAILED = "The back-end gave no answer."

    @classmethod
    def of(cls, said: "Status", certificate: Certificate, tolerance: float) -> "Status":
        """Derive the status from a certificate; the solver's statement decides where the certificate leaves the status
        open.

        Args:
            said: the solver's statement.
            certificate: certificate of the answer.
            tolerance: the requested relative gap.

        Returns:
            The status.
        """
        if not isfinite(certificate.primal):
            return cls.FAILED if said is cls.FAILED else cls.NON_FINITE
        if not certificate.convex:
            return cls.STATIONARY if certificate.kkt_residual <= tolerance else said
        if certificate.gap == inf:
            return cls.INCONSISTENT
        if certificate.relative_gap <= tolerance:
            return cls.SOLVED
        return cls.UNCONFIRMED if said is cls.SOLVED else said


@dataclass(frozen=True, eq=False, repr=False)
class Solution(Shown):
    """The answer of a solver, with a certificate that does not depend on the solver.

    Args:
        weight: V [m n], a tensor. `convexprune.solve` returns the kind of array in which the problem was stated.
        status: how the solve ended.
        certificate: how far the weight is from optimal.
        iterations: how many were made.
        products: matrix products [m n] x [n n], the unit of cost; foreign back-ends report zero.
        solve_seconds: seconds in the solver or the back-end.
        build_seconds: seconds of translating the problem to the form of a back-end.
        residual: the quadratic's residual at the weight [m n], if the solver knows it, for whoever goes on from there.
        parts: the solution of each problem, where several were solved side by side.
        solver: the solver, and why it was taken.
        intercept: the constant of each row [m], or a number, if the quadratic was made with one.
    """

    weight: Tensor
    status: Status
    certificate: Certificate
    iterations: int
    products: int
    solve_seconds: float
    build_seconds: float = 0.0
    residual: Tensor | None = None
    parts: tuple["Solution", ...] = ()
    solver: str = ""
    intercept: Any = None

    def facts(self) -> dict[str, str]:
        """Return what a person asks first: the status, the certificate, the cost and the zeros."""
        zeros = float((torch.as_tensor(self.weight) == 0).double().mean())
        return {
            "status": f"{self.status.name.lower().replace('_', ' ')}. {self.status.value}",
            **self.certificate.facts(),
            "iterations": f"{self.iterations}",
            "seconds": f"{self.solve_seconds + self.build_seconds:.3g}",
            "zeros": f"{zeros:.1%} of {list(self.weight.shape)}",
            **({"solver": self.solver} if self.solver else {}),
        }

    def __repr__(self) -> str:
        gap = self.certificate.relative_gap
        return f"<Solution {self.status.name} {list(self.weight.shape)} relative_gap={gap:.2g} {self.solver}>"

    @classmethod
    def together(cls, parts: "Sequence[Solution]", weight: Tensor, residual: Tensor | None = None) -> "Solution":
        """Join solutions of problems that were solved side by side: sums, and the worst status.

        Args:
            parts: solutions by problem; a single one is returned unchanged.
            weight: V of all problems [m n].
            residual: residual of all problems [m n].

        Returns:
            The solution.
        """
        if len(parts) == 1:
            return replace(parts[0], residual=residual)
        certificates = [each.certificate for each in parts]
        total = Certificate(
            sum(each.primal for each in certificates),
            sum(each.gap for each in certificates),
            max(each.kkt_residual for each in certificates),
            sum(each.resolution for each in certificates),
        )
        worst = max((each.status for each in parts), key=list(Status).index)
        iterations, products = (max(getattr(each, name) for each in parts) for name in ("iterations", "products"))
        seconds = sum(each.solve_seconds for each in parts)
        return cls(weight, worst, total, iterations, products, seconds, residual=residual, parts=tuple(parts))

    @property
    def each(self) -> "tuple[Solution, ...]":
        """The solutions by problem; for a single problem the solution itself."""
        return self.parts or (self,)

    def record(self) -> "Solution":
        """Return the solution without its large tensors, for a report: the weight is [m 0]."""
        nothing = self.weight.new_empty(len(self.weight), 0)
        return replace(self, weight=nothing, residual=None, parts=tuple(part.record() for part in self.parts))


class StepResult(NamedTuple):
    """A weight on the way to a solution."""

    weight: Tensor  # V [m n]
    residual: Tensor | None  # of the quadratic at V [m n], if known
    products: int  # number of matrix products
    solution: Solution | None = None  # the weight with its certificate, if certified


class AbstractSolver(ABC):
    """The base of all solvers: a dataclass of settings, or a user's subclass with `penalties` and `solve`.

    Raises:
        RecipeError: a setting of a dataclass has a wrong type, or is out of range.
    """

    batches: ClassVar[Literal["", "rows", "stacks"]] = ""
    """Problems that it solves together: as rows of one Gram matrix, or with a stack of Gram matrices, too."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    @abstractmethod
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """The accepted penalties."""

    @abstractmethod
    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """Minimise the problem.

        Args:
            problem: min q + p.
            start: where to begin [m n]; None is the anchor, or zero.

        Returns:
            The solution.

        Raises:
            UnsupportedError: the penalty is not one of `penalties`.
            ProblemError: `start` is not shaped like the problem.
        """

    def step(self, problem: Problem, start: Tensor, residual: Tensor, certified: bool = True) -> StepResult:
        """Go some way towards the minimum; the next problem is posed from the answer.

        The default solves, which suits a solver with cheap certificates.

        Args:
            problem: min q + p.
            start: the first weight [m n].
            residual: the quadratic's residual at `start` [m n].
            certified: if False, no solution is needed, and the residual at the end need not be exact.

        Returns:
            The weight reached.
        """
        solution = run(self, problem, start, certified)
        proven = solution if certified or _is_ours(self) else None
        return StepResult(solution.weight, solution.residual, solution.products, proven)


def run(solver: AbstractSolver, problem: Problem, start: Tensor | None = None, certified: bool = True) -> Solution:
    """Solve a problem by any solver. The answer of a user's solver is checked, and certified here."""
    solution = solver.solve(problem, start)
    if _is_ours(solver):
        return solution
    name = type(solver).__name__
    if not isinstance(solution, Solution):
        raise ProblemError(
            f"{name}.solve returned a value of type {type(solution).__name__}; it must return a Solution."
        )
    try:
        weight = problem.admit(solution.weight)
    except ProblemError as cause:
        raise ProblemError(f"{name}.solve returned a solution that is none. {cause}") from cause
    solution = replace(solution, weight=weight.to(problem.quadratic.cross), residual=None)
    if not certified:
        return solution
    certificate = certify(problem, weight)
    status = Status.of(solution.status, certificate, promised_gap(solver))
    return replace(solution, status=status, certificate=certificate)


def certified(
    problem: Problem, weight: Tensor, made: Sequence[tuple[Status, int, int]], tolerance: float, began: float,
    precise: bool = True, residual: Tensor | None = None,
) -> Solution:  # fmt: skip
    """Certify each problem side by side; `made` has by problem the solver's status, its iterations and products."""
    certificates = certify_each(problem, weight, precise, residual)
    seconds = (time.perf_counter() - began) / len(certificates)
    parts = [
        Solution(part, Status.of(said, certificate, tolerance), certificate, iterations, products, seconds)
        for part, certificate, (said, iterations, products) in zip(
            weight.chunk(len(certificates)), certificates, made, strict=True
        )
    ]
    return Solution.together(parts, weight, residual)


def promised_gap(solver: AbstractSolver) -> float:
    """Return the relative gap at which a solver says that it is done."""
    return getattr(solver, "tolerance", TOLERANCE)


def _is_ours(solver: AbstractSolver) -> bool:
    return type(solver).__module__.startswith(f"{__package__}.")


def require_penalty(solver: AbstractSolver, penalty: type[AbstractPenalty]) -> None:
    """Refuse a penalty that a solver does not take, before any work."""
    if not issubclass(penalty, solver.penalties):
        takes = ", ".join(p.__name__ for p in solver.penalties)
        raise UnsupportedError(
            f"{type(solver).__name__} does not take the penalty {penalty.__name__}; it takes: {takes}."
        )


def initial(problem: Problem, start: Tensor | None) -> Tensor:
    """Return where a solver begins [m n], in memory of its own: the start, else the anchor, else zero."""
    point, cross = problem.quadratic.anchor if start is None else problem.admit(start), problem.quadratic.cross
    return torch.zeros_like(cross) if point is None else point.to(cross, copy=True)


def square_root(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return F [rank n] with H = F' F, and the pseudo-inverse of F [n rank].

    Of H = 0 both hold a row of zeros, because CVXPY takes no empty matrix.
    """
    values, vectors = np.linalg.eigh(gram)
    keep = values > values.max(initial=0) * len(values) * np.finfo(float).eps
    if not keep.any():
        return np.zeros((1, len(gram))), np.zeros((len(gram), 1))
    root = np.sqrt(values[keep])
    return root[:, None] * vectors[:, keep].T, vectors[:, keep] / root
