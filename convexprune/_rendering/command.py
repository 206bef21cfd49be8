"""The command line that repeats a run."""

import json
import shlex
from typing import Any

from convexprune._recipe_file import GIVEN
from convexprune.errors import ConvexpruneError
from convexprune.recipe import make_recipe
from convexprune.report import Report
from convexprune.solvers import solver_names

from .facts import short


def command_of(report: Report, folder: str, whole_paths: bool = False) -> str | None:
    """Return the command line that repeats a run; None if the model or the tokens were objects in memory."""
    chosen = _chosen(report.recipe)
    texts = [value for value in chosen.values() if isinstance(value, str)]
    if any(text.endswith(GIVEN) for text in texts) or chosen.get("solver", "fista") not in solver_names():
        return None
    named = {n: short(value) if isinstance(value, str) and not whole_paths else value for n, value in chosen.items()}
    model = [named.pop("model")] if "model" in named else []
    options = [part for name, value in named.items() for part in _option(name, value)]
    packed = [] if report.packed is None else ["--pack"]
    return shlex.join(["convexprune", "prune", *model, *options, *packed, "--output", folder])


def _chosen(recipe: dict[str, Any]) -> dict[str, Any]:
    kept = recipe
    for name in recipe:
        rest = {key: value for key, value in kept.items() if key != name}
        if _same(rest, recipe):
            kept = rest
    return kept


def _same(settings: dict[str, Any], recipe: dict[str, Any]) -> bool:
    try:
        return make_recipe(**settings).model_dump(mode="json") == recipe
    except ConvexpruneError:
        return False


def _option(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, dict):
        return [option, json.dumps(value)]
    values = value if isinstance(value, list | tuple) else [value]
    return [part for each in values for part in (option, json.dumps(each) if isinstance(each, dict) else str(each))]
