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
    from convexprune._api.calls import PermuteResult, PruneResult, permute, prune
    from convexprune._api.exporting import export
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
    from convexprune.solvers import AbstractSolver, Solution, Status, make_solver, path, solve, solver_names
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
    "pack", "parse_pattern", "path", "permute", "perplexity", "problems", "prune", "pruners", "solve", "solver_names",
    "solvers", "to_cvxpy", "unpack", "verify",
]  # fmt: skip

_NAMES = {
    "adapters._inspection.inspection": ("Inspection", "inspect"),
    "adapters._loading.packed": ("load",),
    "adapters._training": ("KeepZeros", "keep_zeros"),
    "_api.calls": ("PermuteResult", "PruneResult", "permute", "prune"),
    "_api.exporting": ("export",),
    "_container": ("Packed", "pack", "unpack"),
    "_progress": ("Event",),
    "constraints": ("SemiStructured", "Unstructured", "parse_pattern"),
    "core": (
        "L1", "MCP", "SCAD", "AbstractPenalty", "Blocks", "Certificate", "ElasticNet", "GroupLasso", "Moments",
        "NuclearNorm", "Problem", "Quadratic", "ReverseHuber", "RowGroups", "Support", "TotalVariation", "certify",
    ),
    "recipe": ("Recipe",),
    "report": ("OperatorReport", "Report"),
    "solvers._from_cvxpy": ("from_cvxpy", "to_cvxpy"),
    "solvers": ("AbstractSolver", "Solution", "Status", "make_solver", "path", "solve", "solver_names"),
    "validation": (
        "Evaluation", "Verification", "advise", "compare", "compare_samples", "evaluate", "perplexity", "verify",
    ),
}  # fmt: skip
_PLACES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("convexprune")
    if name in _PLACES:
        return getattr(import_module(f"convexprune.{_PLACES[name]}"), name)
    if name in __all__:
        return import_module(f"convexprune.{name}")
    raise AttributeError(f"module 'convexprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
