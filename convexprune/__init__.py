"""Prune language models by convex optimization, the final solves certified by a duality gap.

    result = convexprune.prune("facebook/opt-125m", solver="fista", sparsity=0.5, dataset="c4")

The mathematics stands on its own: `Quadratic`, `L1`, `Support`, `Problem`, `certify`, `make_solver`. A name is imported
when it is first used: torch and transformers take seconds, and whoever wants help only does not wait for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convexprune import errors, problems, pruners, solvers
    from convexprune.adapters.inspection import Inspection, inspect
    from convexprune.adapters.packed import load
    from convexprune.api import PermuteResult, PruneResult, permute, prune
    from convexprune.container import Packed, pack, unpack
    from convexprune.moments import Moments
    from convexprune.pattern import SemiStructured, Unstructured, parse_pattern
    from convexprune.penalty import L1, AbstractPenalty, ReverseHuber, Support
    from convexprune.problem import Certificate, Problem, certify
    from convexprune.quadratic import Quadratic
    from convexprune.recipe import Recipe
    from convexprune.report import OperatorReport, Report
    from convexprune.solvers import AbstractSolver, Solution, Status, make_solver, solver_names
    from convexprune.validation import Verification, compare, compare_samples, perplexity, verify

__all__ = [
    "L1", "AbstractPenalty", "AbstractSolver", "Certificate", "Inspection", "Moments", "OperatorReport", "Packed",
    "PermuteResult", "Problem", "PruneResult", "Quadratic", "Recipe", "Report", "ReverseHuber", "SemiStructured",
    "Solution", "Status", "Support", "Unstructured", "Verification", "certify", "compare", "compare_samples", "errors",
    "inspect", "load", "make_solver", "pack", "parse_pattern", "permute", "perplexity", "problems", "prune", "pruners",
    "solver_names", "solvers", "unpack", "verify",
]  # fmt: skip

_NAMES = {
    "adapters.inspection": ("Inspection", "inspect"),
    "adapters.packed": ("load",),
    "api": ("PermuteResult", "PruneResult", "permute", "prune"),
    "container": ("Packed", "pack", "unpack"),
    "moments": ("Moments",),
    "pattern": ("SemiStructured", "Unstructured", "parse_pattern"),
    "penalty": ("L1", "AbstractPenalty", "ReverseHuber", "Support"),
    "recipe": ("Recipe",),
    "problem": ("Certificate", "Problem", "certify"),
    "quadratic": ("Quadratic",),
    "report": ("OperatorReport", "Report"),
    "solvers": ("AbstractSolver", "Solution", "Status", "make_solver", "solver_names"),
    "validation": ("Verification", "compare", "compare_samples", "perplexity", "verify"),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"convexprune.{_PLACES[name]}"), name)
    if name in __all__:
        return import_module(f"convexprune.{name}")
    raise AttributeError(f"module 'convexprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
