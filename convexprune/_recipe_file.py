"""recipe.yaml: the recipe beside a result, written by a run and read again by whoever has the folder."""

from pathlib import Path
from typing import Any

import yaml

from convexprune._schema.group import load_yaml
from convexprune._schema.settings import GROUPS
from convexprune._storage.files import read_text, write_text
from convexprune.errors import RecipeError
from convexprune.recipe import Recipe, make_recipe

RECIPE = "recipe.yaml"
GIVEN = " given by the caller"
LONGEST = 1 << 18  # bytes; thousands of targets have less


def write_recipe(recipe: Recipe, folder: Path) -> Path:
    """Write the recipe into a folder, and say where."""
    values, parts = recipe.model_dump(mode="json"), list[str]()
    for group in GROUPS:
        settings = {name: values[name] for name in group.model_fields}
        parts.append(f"# {group.group}\n{yaml.safe_dump(settings, sort_keys=False)}")
    write_text(folder / RECIPE, "\n".join(parts))
    return folder / RECIPE


def given(value: object) -> str:
    """Describe a model or tokens handed over in memory, for a recipe. Nobody can read such objects again."""
    return f"{type(value).__name__}{GIVEN}"


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file, which may be a stranger's."""
    try:
        given = load_yaml(read_text(path, LONGEST))
    except (yaml.YAMLError, ValueError, RecursionError) as cause:
        raise RecipeError(f"{path} is damaged, or no recipe: {' '.join(str(cause).split())[:200]}.") from cause
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise RecipeError(f"{path} is damaged, or no recipe: it is no list of settings and their values.")
    return given


def read_recipe(place: Path) -> Recipe:
    """Return the recipe of a file or of a run's folder."""
    return make_recipe(**read_settings(place / RECIPE if place.is_dir() else place))
