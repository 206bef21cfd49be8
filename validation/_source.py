"""The input of `verify`, without trust in it: a fresh model, or the folder of a finished run and its report."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isclose, isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune import adapters
from convexprune._container.provenance import require_as_written
from convexprune._recipe_file import GIVEN, RECIPE, read_recipe
from convexprune._runs.folder import REMOVED, REPORT, RunFolder, checksum, differences
from convexprune._storage.files import checksum_inside, named
from convexprune.adapters import (
    HuggingFaceModel,
    ParameterOperator,
    find_removal,
    local_folder,
    needs_sampling,
    parts_of,
    refuse_packed,
)
from convexprune.constraints import FAMILIES, Constraint
from convexprune.errors import CalibrationError, ModelError, OutputError, RecipeError
from convexprune.recipe import Recipe, make_recipe
from convexprune.report import OperatorReport, Report

from ._layer_problems import OperatorProblem

MOVED = ("model", "dataset")  # of a run, which may be elsewhere by now


@dataclass(frozen=True, eq=False)
class Source:
    recipe: Recipe  # of the run, or of a pruning to try
    dense: HuggingFaceModel
    dataset: Any  # as in the recipe, or at its new place
    pruned: HuggingFaceModel | None = None  # of a run
    report: Report | None = None

    def tokens(self) -> tuple[Tensor, bool]:
        """Return the windows to verify on, and True if the run had the same; the model may write another text here."""
        tokens = adapters.recipe_windows(self.dataset, self.dense, self.recipe)[0]
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
    """Open a model, to be pruned by settings of a recipe, or a finished run, whose settings are places."""
    folder = None if source is None else named(source)
    if folder is not None and RunFolder(folder).is_unfinished:
        raise OutputError(f"The run of {folder} is unfinished. Finish it with resume=True (--resume), then verify it.")
    if folder is not None and any((folder / name).is_file() for name in (RECIPE, REPORT)):
        return _open_run(folder, settings, device, allow_changed)
    if "model" in settings:
        raise RecipeError(f"model={str(settings['model'])!r} is for the folder of a run; {source} is a model itself.")
    if source is None:
        of_bundled = {"max_seq_length": adapters.EMBEDDED_WINDOW, "num_calibration_samples": 64}
        settings = {"dtype": "float32"} | of_bundled | settings
    settings = settings | {"allocation": settings.get("allocation") or "uniform"}
    if settings["allocation"] != "uniform":
        raise RecipeError(f"allocation={settings['allocation']!r}: prune with it, and verify the folder of the run.")
    recipe = make_recipe(model=adapters.BUNDLED if source is None else str(source), **settings)
    if recipe.build_pattern().removes:
        raise RecipeError(f"Pattern {recipe.pattern!r}: prune with it, and verify the folder of the run.")
    adapters.check_dataset(recipe.dataset)
    dense = load_as(recipe, recipe.model, device, allow_changed)
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
    adapters.check_dataset(dataset)
    dense = load_as(recipe, model, device, allow_changed)
    _require_same_model(dense, model, report)
    pruned, pattern = load_as(recipe, folder, device, allow_changed), recipe.build_pattern()
    if pattern.removes:
        pruned = _widened(dense, load_as(recipe, model, device, allow_changed), pruned, pattern, folder)
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


def load_as(recipe: Recipe, source: str | Path, device: str, allow_changed: bool) -> HuggingFaceModel:
    chosen = {"targets": recipe.targets, "ignore": recipe.ignore, "allow_changed": allow_changed}
    return adapters.load(source, device=device, dtype=recipe.torch_dtype, **chosen)


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
        raise OutputError(
            "The report of the run does not say which model it pruned, as none of a run in memory does. Prune into a "
            "folder (output_dir, --output) to verify."
        )
    if report.environment.get("loading") == "layer by layer":
        folder = local_folder(str(source), "main") if str(source) != adapters.BUNDLED else adapters.EMBEDDED
        now = {name: checksum_inside(folder, name) for name in then}
    else:
        now = dense.origin().checksums
    if differing := differences(then, now):
        raise ModelError(
            f"{source} is not the model that was pruned; it differs in {', '.join(differing[:5])}. Say where that one "
            "is: model=... (--model)."
        )


def on_grids(dense: HuggingFaceModel, recipe: Recipe) -> list[str]:
    """Return the names of embedding and head, if the run has put them on grids: nothing tells what they should be."""
    return adapters.ends(dense) if recipe.embedding is not None or recipe.quantize in FAMILIES else []


def altered(dense: HuggingFaceModel, pruned: HuggingFaceModel, recipe: Recipe) -> list[str]:
    """Return the tensors that a run leaves alone and that are not the dense model's; zeros of a removal are right."""
    operators = [(y.name, o) for y in dense.layers for o in y.operators if isinstance(o, ParameterOperator)]
    changed = [f"{layer}.{operator.place.path}" for layer, operator in operators]
    here, there = (model.model.state_dict(keep_vars=True) for model in (dense, pruned))
    by_right = {id(here[name]) for name in (*changed, *(f"{name}.weight" for name in on_grids(dense, recipe)))}
    removes, dtype = recipe.build_pattern().removes is not None, pruned.model.dtype

    def is_same(*both: Tensor) -> bool:
        one, other = (x.to(dtype) if x.is_floating_point() else x for x in both)  # a folder has one dtype
        return torch.equal(one.where(other != 0, 0) if removes else one, other)

    left = (name for name, tensor in here.items() if id(tensor) not in by_right)
    return [name for name in left if name not in there or not is_same(here[name], there[name])]


SAME = 0.05  # relative: another machine may round the hidden states otherwise
NOTHING = 1e-9  # an error that is only rounding


@dataclass(frozen=True)
class ReportedError:
    """The relative error of an operator, reported and measured again on the same tokens."""

    operator: str
    error: float
    reported: float
    growth: float  # largest absolute weight over the dense operator's

    def cells(self) -> list[str]:
        return [self.operator, f"{self.error:.3e}", f"{self.reported:.3e}", f"{self.growth:.2f}"]

    @property
    def fault(self) -> str:
        """A sentence if the errors differ more than on two machines. Operators without input have NaN."""
        both = isnan(self.error) and isnan(self.reported)
        if both or isclose(self.error, self.reported, rel_tol=SAME, abs_tol=NOTHING):
            return ""
        return f"{self.operator}: its error is {self.error:.3e}, not {self.reported:.3e} as reported"


def reported_errors(operator: OperatorProblem, reports: Iterable[OperatorReport]) -> list[ReportedError]:
    """Measure an operator's error with its tokens' weights, beside the reported error, unless tokens were borrowed."""
    problem, achieved = operator.rows(None, torch.Generator())
    error = float(problem.squared_error(achieved).sum() / problem.energy.sum())
    own = [o for o in reports if o.name == operator.name and "borrowed_tokens" not in o.facts]
    growth = float(achieved.abs().max() / problem.weight.abs().max())
    said = ((o, o.relative_error if o.weighted_error is None else o.weighted_error) for o in own)
    return [ReportedError(o.name, error, reported, growth) for o, reported in said]


def require_same_shapes(dense: HuggingFaceModel, pruned: HuggingFaceModel, reports: Sequence[OperatorReport]) -> None:
    shapes = [{f"{y.name}.{o.name}": o.shape for y in m.layers for o in y.operators} for m in (dense, pruned)]
    shapes.append({report.name: (report.outputs, report.inputs) for report in reports})
    for name in dict.fromkeys(name for each in shapes for name in each):
        here, there, said = (each.get(name) for each in shapes)
        if not here == there == said:
            raise ModelError(
                f"{name} is {here} in the dense model, {there} in the run and {said} in its report: not of one model."
            )
