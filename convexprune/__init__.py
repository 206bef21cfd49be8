"""Prune language models by convex optimization, the final solves certified by a duality gap.

    result = convexprune.prune("facebook/opt-125m", solver="fista", sparsity=0.5, dataset="c4")

The mathematics stands alone: `Quadratic`, `L1`, `Support`, `Problem`, `certify`, `make_solver`. Names are imported at
first use: torch and transformers take seconds, and help needs neither.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convexprune import errors, problems, pruners, solvers
    from convexprune._api.calls import PermuteResult, PruneResult, export, permute, prune
    from convexprune._container import Packed, pack, unpack
    from convexprune._progress import Event
    from convexprune.adapters._inspection.inspection import Inspection, inspect
    from convexprune.adapters._loading.packed import load
    from convexprune.adapters._training import KeepZeros, keep_zeros
    from convexprune.constraints import SemiStructured, Unstructured, parse_pattern
    from convexprune.core import (
        L1,
        MCP,
        SCAD,
        AbstractPenalty,
        Blocks,
        Certificate,
        ElasticNet,
        GroupLasso,
        Moments,
        NuclearNorm,
        Problem,
        Quadratic,
        ReverseHuber,
        RowGroups,
        Support,
        TotalVariation,
        certify,
    )
    from convexprune.recipe import Recipe
    from convexprune.report import OperatorReport, Report
    from convexprune.solvers import AbstractSolver, Solution, Status, make_solver, path, solve, solve_all, solver_names
    from convexprune.solvers._from_cvxpy import from_cvxpy, to_cvxpy
    from convexprune.validation import (
        Evaluation,
        Verification,
        advise,
        compare,
        compare_samples,
        evaluate,
        perplexity,
        verify,
    )

__all__ = [
    "L1", "MCP", "SCAD", "AbstractPenalty", "AbstractSolver", "Blocks", "Certificate", "ElasticNet", "Evaluation",
    "Event", "GroupLasso", "Inspection", "KeepZeros", "Moments", "NuclearNorm", "OperatorReport", "Packed",
    "PermuteResult",
    "Problem", "PruneResult", "Quadratic", "Recipe", "Report", "ReverseHuber", "RowGroups", "SemiStructured",
    "Solution", "Status", "Support", "TotalVariation", "Unstructured", "Verification", "advise", "certify", "compare",
    "compare_samples", "errors", "evaluate", "export", "from_cvxpy", "inspect", "keep_zeros", "load", "make_solver",
    "pack", "parse_pattern", "path", "permute", "perplexity", "problems", "prune", "pruners", "solve", "solve_all",
    "solver_names", "solvers", "to_cvxpy", "unpack", "verify",
]  # fmt: skip

_ROOMS = (
    "_progress", "constraints", "core", "solvers", "report", "recipe", "_container", "adapters._loading.packed",
    "adapters._training", "adapters._inspection.inspection", "validation", "_api.calls",
)  # fmt: skip
"""Where the names are, the quickest to import first."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("convexprune")
    if name in ("errors", "problems", "pruners", "solvers"):
        return import_module(f"convexprune.{name}")
    if name in ("from_cvxpy", "to_cvxpy"):  # an extra
        return getattr(import_module("convexprune.solvers._from_cvxpy"), name)
    if name in __all__:
        rooms = (import_module(f"convexprune.{room}") for room in _ROOMS)
        return next(getattr(room, name) for room in rooms if hasattr(room, name))
    raise AttributeError(f"module 'convexprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
