"""Prune language models by convex optimization, the final solves certified by a duality gap.

    result = convexprune.prune("facebook/opt-125m", solver="fista", sparsity=0.5, dataset="c4")

The mathematics stands on its own: `Quadratic`, `L1`, `Support`, `Problem`, `certify`, `make_solver`.
"""

from typing import TYPE_CHECKING, Any

from convexprune.moments import Moments
from convexprune.pattern import SemiStructured, Unstructured, parse_pattern
from convexprune.penalty import L1, AbstractPenalty, ReverseHuber, Support
from convexprune.problem import Certificate, Problem, certify
from convexprune.quadratic import Quadratic
from convexprune.solvers import AbstractSolver, Solution, Status, make_solver, solver_names

if TYPE_CHECKING:
    from convexprune.api import PermuteResult, PruneResult, permute, prune

__all__ = [
    "L1", "AbstractPenalty", "AbstractSolver", "Certificate", "Moments", "PermuteResult", "Problem", "PruneResult",
    "Quadratic", "ReverseHuber", "SemiStructured", "Solution", "Status", "Support", "Unstructured", "certify",
    "make_solver", "parse_pattern", "permute", "prune", "solver_names",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`prune` and `permute` bring transformers, which takes seconds: only those who ask for them wait."""
    if name in ("permute", "prune", "PermuteResult", "PruneResult"):
        from convexprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'convexprune' has no attribute {name!r}")
