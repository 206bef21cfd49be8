"""The arguments of `prune` and `permute` that no recipe covers: of another kind they are refused before any work."""

from collections.abc import Mapping
from typing import Any

from convexprune.errors import OutputError, RecipeError
from convexprune.solvers import AbstractSolver, solver_names


def check_arguments(settings: Mapping[str, Any]) -> None:
    """Refuse what is of no use: a solver that is none, progress that cannot be called, a folder without a name.

    Raises:
        RecipeError, OutputError: what came, and what is accepted.
    """
    solver, progress, folder = settings.get("solver", ""), settings["progress"], settings["output_dir"]
    if not isinstance(solver, str | AbstractSolver):
        given = f"the class {solver.__name__}" if isinstance(solver, type) else f"a {type(solver).__name__}"
        raise RecipeError(
            f"solver is {given}. Accepted: {', '.join(solver_names())}, or an object of a class of your own that "
            "derives from convexprune.AbstractSolver."
        )
    if not (progress is None or callable(progress)):
        raise RecipeError(
            f"progress is a {type(progress).__name__}. Accepted: a function that gets a number of steps and returns "
            "one that is called with each."
        )
    if isinstance(folder, str) and not folder.strip():
        raise OutputError("output_dir is an empty text. Give a folder, '.' for this one; or leave it out.")
    if settings.get("resume") and folder is None:
        raise RecipeError("resume=True goes on with a run in a folder. Give output_dir, or leave resume out.")
