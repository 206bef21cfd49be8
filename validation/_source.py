"""The input of `verify`: a fresh model, or the folder of a finished run, without trust in the folder."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convexprune._container.provenance import require_as_written
from convexprune._recipe_file import GIVEN, RECIPE, read_recipe
from convexprune._runs.folder import REMOVED, REPORT, RunFolder
from convexprune._runs.identity import checksum, differences
from convexprune._storage.files import checksum_inside, named
from convexprune.adapters import (
    BUNDLED,
    EMBEDDED,
    EMBEDDED_WINDOW,
    HuggingFaceModel,
    check_dataset,
    load,
    recipe_windows,
)
from convexprune.adapters._checkpoints.model_folder import local_folder, refuse_packed
from convexprune.adapters._data.mixture import needs_sampling, parts_of
from convexprune.adapters._removal.find import find_removal
from convexprune.constraints import Constraint
from convexprune.errors import CalibrationError, ModelError, OutputError, RecipeError
from convexprune.recipe import Recipe, make_recipe
from convexprune.report import Report

MOVED = ("model", "dataset")  # of a run, which may be elsewhere by now


@dataclass(frozen=True, eq=False)
class Source:
    """The models and the data set of `verify`."""

    recipe: Recipe  # of the run, or of a pruning to try
    dense: HuggingFaceModel
    dataset: Any  # as in the recipe, or at its new place
    pruned: HuggingFaceModel | None = None  # of a run
    report: Report | None = None

    def tokens(self) -> tuple[Tensor, bool]:
        """Return the windows to verify on, and True if the run had the same; the model may write another text here."""
        tokens = recipe_windows(self.dataset, self.dense, self.recipe)[0]
        if self.report is None:
            return tokens, False
        known = self.report.identity.get("tokens")
        same = isinstance(known, dict) and known.get("calibration") == checksum(tokens)
        if not same and not needs_sampling(self.recipe.dataset):
            raise CalibrationError(f"{self.dataset} does not give the tokens of the run. Name its own: dataset=...")
        return tokens, same


def open_source(
    source: str | Path | None, settings: dict[str, Any], device: str, allow_changed: bool = False
) -> Source:
    """Open a model, to be pruned by the settings of a recipe, or a finished run, whose settings are places; see
    `verify`.
    """
    folder = None if source is None else named(source)
    if folder is not None and RunFolder(folder).is_unfinished:
        raise OutputError(f"The run of {folder} is unfinished. Finish it with resume=True (--resume), then verify it.")
    if folder is not None and any((folder / name).is_file() for name in (RECIPE, REPORT)):
        return _open_run(folder, settings, device, allow_changed)
    if "model" in settings:
        raise RecipeError(f"model={str(settings['model'])!r} is for the folder of a run; {source} is a model itself.")
    if source is None:
        settings = {"dtype": "float32", "max_seq_length": EMBEDDED_WINDOW, "num_calibration_samples": 64} | settings
    settings = settings | {"allocation": settings.get("allocation") or "uniform"}
    if settings["allocation"] != "uniform":
        raise RecipeError(f"allocation={settings['allocation']!r}: prune with it, and verify the folder of the run.")
    recipe = make_recipe(model=BUNDLED if source is None else str(source), **settings)
    if recipe.build_pattern().removes:
        raise RecipeError(f"Pattern {recipe.pattern!r}: prune with it, and verify the folder of the run.")
    check_dataset(recipe.dataset)
    dense = _load(recipe.model, recipe, device, allow_changed)
    return Source(recipe, dense, recipe.dataset)


def _open_run(folder: Path, settings: dict[str, Any], device: str, allow_changed: bool) -> Source:
    if others := [name for name in settings if name not in MOVED]:
        raise RecipeError(f"{folder} is a finished run with its own recipe; leave out: {', '.join(others)}.")
    run = RunFolder(folder)
    refuse_packed(folder)
    require_as_written(folder, allow_changed)
    recipe, report = read_recipe(folder), run.report()
    place = {name: _found(name, folder, recipe, report) for name in MOVED if name not in settings} | settings
    model, dataset = place["model"], place["dataset"]
    check_dataset(dataset)
    dense = _load(model, recipe, device, allow_changed)
    _require_same_model(dense, model, report)
    pruned, pattern = _load(folder, recipe, device, allow_changed), recipe.build_pattern()
    if pattern.removes:
        pruned = _widened(dense, _load(model, recipe, device, allow_changed), pruned, pattern, folder)
    return Source(recipe, dense, dataset, pruned, report)


def _widened(
    dense: HuggingFaceModel, other: HuggingFaceModel, narrower: HuggingFaceModel, pattern: Constraint, folder: Path
) -> HuggingFaceModel:
    """Return the `other` dense model with the weights of a narrower model. Only the repair of the removal is judged."""
    note = folder / REMOVED[pattern.removes or ""]
    removal = find_removal(dense, pattern)
    try:
        narrowed = removal.without(json.loads(note.read_bytes())["removed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise OutputError(f"{note} does not say which {pattern.removes} were removed ({cause}).") from cause
    narrowed.widen(narrower, other)
    for model in (dense, other):
        narrowed.choose(model)
    return other


def _load(source: str | Path, recipe: Recipe, device: str, allow_changed: bool) -> HuggingFaceModel:
    chosen = {"targets": recipe.targets, "ignore": recipe.ignore, "allow_changed": allow_changed}
    return load(source, device=device, dtype=recipe.torch_dtype, **chosen)


def _found(name: str, folder: Path, recipe: Recipe, report: Report) -> str:
    """Return the place of a run's model or data set: the recorded place, or the place beside a moved folder."""
    text: str = getattr(recipe, name)
    if text.endswith(GIVEN):
        raise RecipeError(f"The {name} of this run was a {text}. Name one that is the same: {name}=... (--{name}).")
    path, was = Path(text), report.environment.get("folder")
    if not path.is_absolute() or "#" in text or len(parts_of(text)) > 1:  # a name, a column, or several texts
        return text
    places = [path, *([folder / os.path.relpath(path, was)] if isinstance(was, str) else [])]
    for place in places:
        if place.is_dir() or place.is_file():
            return str(place)
    raise RecipeError(f"The {name} of this run, {text}, is not there. Say where it is now: {name}=... (--{name}).")


def _require_same_model(dense: HuggingFaceModel, source: str | Path, report: Report) -> None:
    """Check that the model is the pruned model's origin: by files if streamed, else by tensors."""
    then = report.identity.get("weights")
    if not isinstance(then, dict):
        raise OutputError("The report of the run does not say which model it pruned.")
    if report.environment.get("loading") == "layer by layer":
        folder = local_folder(str(source), "main") if str(source) != BUNDLED else EMBEDDED
        now = {name: checksum_inside(folder, name) for name in then}
    else:
        now = dense.origin().checksums
    if differing := differences(then, now):
        raise ModelError(
            f"{source} is not the model that was pruned; it differs in {', '.join(differing[:5])}. Say where that one "
            "is: model=... (--model)."
        )
