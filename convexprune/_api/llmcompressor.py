"""Translate recipes of llm-compressor. Entries without an equivalent are refused by name.

The format: stages with names in `_stage` hold groups with names in `_modifiers` of modifiers, by class name.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from convexprune._recipe_file import read_settings
from convexprune.core._allocation import OUTLIER, OWL_REACH
from convexprune.errors import RecipeError, shown
from convexprune.recipe import make_recipe

METHODS = {"SparseGPTModifier": "sparsegpt", "WandaPruningModifier": "wanda", "MagnitudePruningModifier": "magnitude"}
NO_MATTER = {
    "group", "index", "update", "sequential_update", "sequential_targets", "offload_hessians", "leave_enabled",
    "update_scheduler", "scheduler_args",
}  # fmt: skip
"""Settings that change no weight, or only how it is scheduled in training, which is refused itself."""
OFF = {"preserve_sparsity_mask": False, "quantize": False, "apply_globally": False, "start": None, "end": None}
"""Settings that are taken with this value, or none, only."""
DAMPING = ("dampening_frac", "percdamp")


class Modifier(NamedTuple):
    name: str
    targets: list[str]  # as in a recipe
    ignore: list[str]
    settings: dict[str, Any]


def from_llmcompressor(file: Path) -> dict[str, Any]:
    modifiers = [_translated(name, given or {}) for name, given in _modifiers(read_settings(file.expanduser()))]
    if not modifiers:
        raise RecipeError(f"{file} has no pruning modifier. Known: {', '.join(METHODS)}.")
    first, *others = modifiers
    targets = [target for each in modifiers for target in each.targets]
    settings = {"targets": list(dict.fromkeys(targets)), "ignore": first.ignore, **first.settings}
    rules = [_rule(each, first) for each in others]
    # llm-compressor feeds each layer with those pruned before it, and corrects no earlier error.
    settings |= {"prefix": "pruned", "error_correction": 0.0} | ({"rules": rules} if rules else {})
    make_recipe(**settings)
    return {name: value for name, value in settings.items() if value != []}


def _modifiers(recipe: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in recipe.items():
        path = f"{place}{name}"
        if str(name).endswith("Modifier"):
            yield str(name), value
        elif str(name).endswith(("_stage", "modifiers")) and isinstance(value, dict):
            yield from _modifiers(value, f"{path}.")
        elif name == "run_type":
            if value not in ("oneshot", ["oneshot"]):
                raise RecipeError(f"{path} is {shown(value)}: only what is pruned in one shot is translated.")
        elif value or name not in ("args", "metadata", "version"):
            raise RecipeError(
                f"{path} cannot be translated. Known: stages (_stage) of groups (_modifiers) of modifiers."
            )


def _translated(name: str, given: Any) -> Modifier:
    if name not in METHODS:
        raise RecipeError(f"{name} cannot be translated: it is none of {', '.join(METHODS)}.")
    if not isinstance(given, dict):
        raise RecipeError(f"{name} has no settings.")
    left = {k: v for k, v in given.items() if v is not None and k not in NO_MATTER and not k.endswith("_")}
    for setting, value in OFF.items():
        if left.pop(setting, value) not in (value, None):
            raise RecipeError(f"{name}: {setting} cannot be translated. Leave it out.")
    targets, ignore = _names(left.pop("targets", ["Linear"]), name), _names(left.pop("ignore", []), name)
    method = METHODS[name]
    settings = {"method": method} | _pattern(left, name, method) | _allocation(left, name) | _arguments(left, method)
    if left:
        raise RecipeError(f"{name}: {', '.join(left)} cannot be translated. Leave it out.")
    return Modifier(name, targets, ignore, settings)


def _pattern(left: dict[str, Any], name: str, method: str) -> dict[str, Any]:
    """Sparsity, pattern and quota; N:M says there how many of M are pruned, here how many are kept."""
    sparsity, mask = left.pop("sparsity", None), str(left.pop("mask_structure", "0:0"))
    first, last = left.pop("init_sparsity", None), left.pop("final_sparsity", None)
    if first not in (None, last):
        raise RecipeError(
            f"{name}: init_sparsity {first} and final_sparsity {last}: pruning while training is not ours."
        )
    sparsity = last if sparsity is None else sparsity
    if isinstance(sparsity, list | dict):
        raise RecipeError(f"{name}: a sparsity for each layer cannot be translated. Write rules, one for each.")
    match = re.fullmatch(r"(\d+):(\d+)", mask)
    if mask not in ("0:0", "unstructured") and match is None:
        raise RecipeError(f"{name}: mask_structure {shown(mask)} is not N:M.")
    if match is None or mask == "0:0":
        if sparsity is None:
            raise RecipeError(f"{name} says no sparsity.")
        return {"pattern": "unstructured", "sparsity": sparsity} | ({"quota": "row"} if method == "wanda" else {})
    pruned, block = int(match[1]), int(match[2])
    return {"pattern": f"{block - pruned}:{block}"} | ({} if sparsity is None else {"sparsity": sparsity})


def _allocation(left: dict[str, Any], name: str) -> dict[str, Any]:
    """Return OWL's settings, if the constants equal ours."""
    profile, outlier, reach = (left.pop(each, None) for each in ("sparsity_profile", "owl_m", "owl_lmbda"))
    if profile is None:
        return {}
    if str(profile).lower() != "owl" or (outlier, reach) != (OUTLIER, OWL_REACH):
        raise RecipeError(
            f"{name}: sparsity_profile {profile} with owl_m {outlier} and owl_lmbda {reach} cannot be translated. Ours "
            f"is owl with {OUTLIER} and {OWL_REACH}."
        )
    return {"allocation": "owl"}


def _arguments(left: dict[str, Any], method: str) -> dict[str, Any]:
    if method != "sparsegpt":
        return {}
    dampings = [left.pop(name, None) for name in DAMPING]
    found = {"block": left.pop("block_size", None), "damping": next((d for d in dampings if d is not None), None)}
    arguments = {name: value for name, value in found.items() if value is not None}
    return {"method_args": arguments} if arguments else {}


def _names(names: Any, name: str) -> list[str]:
    """Return targets, where a module stands for everything inside."""
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise RecipeError(f"{name}: targets and ignore are lists of names; got {shown(names)}.")
    return [_name(each) for each in listed]


def _name(name: str) -> str:
    if name == "__ALL__" or name.endswith("DecoderLayer"):
        return "Linear"
    if name.startswith("re:"):
        return f"{name[:-1]}(\\..*)?$" if name.endswith("$") else name
    return f"re:{re.escape(name)}(\\..*)?$" if re.search(r"\.\d+$", name) else name


def _rule(modifier: Modifier, first: Modifier) -> dict[str, Any]:
    settings, name = dict(modifier.settings), modifier.name
    if modifier.targets == first.targets:
        raise RecipeError(
            f"{name} prunes what {first.name} has pruned before it: {', '.join(first.targets)}. Take one."
        )
    if modifier.ignore != first.ignore:
        raise RecipeError(f"{name} ignores other operators than {first.name}: a rule cannot. Write both lists alike.")
    same = settings["method"] == first.settings["method"]
    for setting, other in {"allocation": None, "method_args": None if same else {}}.items():
        if settings.pop(setting, other) != (first.settings.get(setting) if other is None else other):
            whose = name if setting in modifier.settings else first.name
            raise RecipeError(f"{whose}: {setting} is of all modifiers or none. Leave it out, or give both the same.")
    quota = settings.pop("quota", "matrix")
    if settings["pattern"] == "unstructured" and quota != first.settings.get("quota", "matrix"):
        settings["pattern"] = f"unstructured {100 * settings.pop('sparsity'):g}% per {quota}"
    return {"targets": modifier.targets, **settings}
