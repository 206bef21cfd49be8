"""The door to comparisons: from names and a folder to `compare.json`, `report.md` and plots, resumable."""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convexprune import adapters
from convexprune._device.machine import PACKAGES, Clock, default_device, installation, versions
from convexprune._device.switches import pinned
from convexprune._progress import OnProgress, begin
from convexprune._progress.shown import visible
from convexprune._recipe_file import given
from convexprune._runs.folder import checksum
from convexprune._schema.functions import COMPARE, TASK_BATCH, Compare
from convexprune._schema.parameters import UNSET, documented
from convexprune._storage.failures import working
from convexprune._storage.files import read_json, write_json
from convexprune._storage.staging import Staging, output_folder, require_empty
from convexprune._storage.tensors import raw
from convexprune.adapters import HuggingFaceModel, shortage
from convexprune.errors import OutputError, RecipeError
from convexprune.recipe import Recipe, make_recipe
from convexprune.report import finite

from ._results import draw, make_row, markdown, tasks_result, text_result, will_draw
from ._side_by_side import DENSE, Comparison, Tokens
from ._source import load_as
from ._texts import evaluate_tasks, require_tasks, text_of
from ._variants import Variant, allocated, layer_settings, make_variants

logger = logging.getLogger(__name__)
IDENTITY = Path("work", "identity.json")
RESULT, SAMPLES = "compare.json", "samples.json"


@visible
@pinned()
@documented(COMPARE)
def compare(
    model: str | Path | None = None,
    methods: Sequence[str] = UNSET,
    sparsities: Sequence[float] = UNSET,
    patterns: Sequence[str] = UNSET,
    conventions: Sequence[str] = UNSET,
    output: str | Path = UNSET,
    *,
    command: str = "",
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compare methods on the same tokens, and write the result as `compare.json` into `output`.

    The folder is there once the comparison is whole. Variants are described at `make_variants`.

    Args:
        command: the command line to state in the report.
        on_progress: takes a `convexprune.Event` as a phase begins and as a step is done.
        settings: by name:
        {settings}

    Returns:
        The content of `compare.json`.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    lists = {"methods": methods, "sparsities": sparsities, "patterns": patterns, "conventions": conventions}
    asked, shared = COMPARE.read(settings | lists | {"output": output})
    dataset = shared.pop("dataset", "self")
    recipe = make_recipe(**adapters.bundled_if_none(shared | {"model": model}) | {"model": ""})
    variants = make_variants(
        asked.methods, asked.sparsities, asked.patterns, asked.conventions, asked.quota, asked.allocations
    )
    drawing = will_draw(asked.plots)
    if asked.tasks:
        require_tasks(asked.tasks, asked.tasks_dir)
    default_device(recipe.device)  # refuses one that is not there
    adapters.check_dataset(dataset)
    staging = Staging(output_folder(asked.output, model), "compare")
    before = resumable(staging, recipe.seed, asked.resume)
    texts = _texts(asked.eval_texts)
    begin("loading the model")
    source = adapters.EMBEDDED if model is None else model
    loaded = load_as(recipe, source, default_device(recipe.device), asked.allow_changed)
    settings = layer_settings(loaded, variants)
    tokens = _tokens(loaded, recipe, asked, dataset, texts)
    card = _card(loaded, tokens, recipe) | {
        "model": "the bundled OPT" if model is None else Path(model).name,
        "dataset": str(dataset) if isinstance(dataset, str | Path) else given(dataset),
        **{name: names for name in ("targets", "ignore") if (names := shared.get(name))},
        **({"tasks": asked.tasks, "items of a task": asked.limit or "all"} if asked.tasks else {}),
    }
    of_tasks = {"names": asked.tasks, "folder": asked.tasks_dir, "limit": asked.limit, "batch_size": TASK_BATCH}
    score = partial(evaluate_tasks, **of_tasks) if asked.tasks else None
    identity = json.loads(json.dumps(card | {"variants": [(variant.name, variant.zeros) for variant in variants]}))
    if before:
        require_same(staging, before, identity)
    with published(staging, identity, before) as is_finished:
        if is_finished:
            return read_json(staging.output / RESULT)
        clock, work = Clock(), staging.place / IDENTITY.parent
        settings = allocated(loaded, tokens, variants, settings, recipe.batch_size)
        clock.lap("survey for allocations")
        comparison = Comparison(loaded, tokens, settings, work, recipe.batch_size, score)
        comparison.run(begin("comparing", comparison.units))
        clock.lap("layers")
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {loaded.device}"
        result = _result(comparison, variants, card | {"command": command, "machine": machine}, clock)
        folder = staging.begin()
        write_json(folder / RESULT, finite(result))
        (folder / "report.md").write_text(markdown(result, draw(result, folder) if drawing else []))
    return result


def _tokens(model: HuggingFaceModel, recipe: Recipe, asked: Compare, dataset: Any, texts: Mapping[str, str]) -> Tokens:
    """Return the tokens to fit, to judge by and to evaluate on; warn if those to fit are few."""
    windows = {name: adapters.text_windows(text, model, asked.eval_window, name) for name, text in texts.items()}
    evaluated = {name: each[: asked.eval_windows or None] for name, each in windows.items()}
    tokens = Tokens(*adapters.recipe_windows(dataset, model, recipe), evaluated)
    widest = max(operator.shape[1] for layer in model.layers for operator in layer.operators)
    if (warning := shortage(tokens.calibration, widest)) is not None:
        logger.warning(warning)
    return tokens


@contextmanager
def published(staging: Staging, identity: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[bool]:
    """Hold the place of an output, and publish it if the block ends well; yield True if it is there already."""
    with working(staging.output), staging.held() as is_free:
        if not is_free:
            raise staging.in_use()
        if _before(staging) != before:
            raise OutputError(f"{staging.output}: another process has just worked on it. Give the command again.")
        is_finished = _result_in(staging.output) is not None
        if not before:
            staging.clear()
            write_json(staging.place / IDENTITY, identity)
        try:
            yield is_finished
        finally:
            if is_finished and read_json(staging.place / IDENTITY) in (None, identity):
                staging.discard()
        if not is_finished:
            staging.publish()
            staging.discard()


def resumable(staging: Staging, seed: int | list[int], resume: bool) -> dict[str, Any]:
    """Return the identity of the comparison to go on with, if any; refuse to lose one, or to take other samples."""
    if not resume or _result_in(staging.output) is None:
        require_empty(staging.output)
    staging.check()
    before = _before(staging)
    if before and not resume:
        raise OutputError(
            f"{staging.place} already holds something: an interrupted comparison. Go on with resume=True (--resume), "
            "or remove this folder."
        )
    if before:
        require_same(staging, {"seed": before["seed"]}, {"seed": seed})
    return before


def require_same(staging: Staging, before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    differing = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
    if differing:
        is_finished = _result_in(staging.output) is not None
        holds = f"{staging.output} holds another finished" if is_finished else f"{staging.place} holds another"
        seeds = f" (--seed {str(before['seed']).strip('[]').replace(' ', '')})" if "seed" in differing else ""
        raise RecipeError(
            f"{holds} comparison; it differs in {', '.join(differing)}. Give the settings that it began with{seeds}, "
            "or another output folder."
        )


def _before(staging: Staging) -> dict[str, Any]:
    if (found := _result_in(staging.output)) is not None:
        card = {name: value for name, value in found["card"].items() if name not in ("command", "machine")}
        return card | {"variants": [[row["name"], row["asked_sparsity"]] for row in found["rows"]]}
    path = staging.place / IDENTITY
    is_begun = path.exists() or any(staging.new.glob("*seed-*"))  # older releases kept no identity of several samples
    return (read_json(path) or {"seed": "unknown"}) if is_begun else {}


def _result_in(folder: Path) -> Any:
    for name in (RESULT, SAMPLES):
        match found := read_json(folder / name):
            case {"card": {"seed": _}, "rows": [{"name": _, "asked_sparsity": _}, *_]}:
                return found
    return None


def _card(model: HuggingFaceModel, tokens: Tokens, recipe: Recipe) -> dict[str, Any]:
    """Return conditions of a result beside the settings: tokens, weights, arithmetic, versions."""
    installed, weights = installation(model.device), hashlib.sha256()
    for name, parameter in model.model.named_parameters():
        weights.update(name.encode())
        weights.update(raw(parameter))
    return {
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "tokens": {name: f"{ids.shape[0]} x {ids.shape[1]}" for name, ids in tokens.streams.items()},
        "hashes": {"model": weights.hexdigest()} | {name: checksum(ids) for name, ids in tokens.streams.items()},
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        **{name: value for name, value in installed.items() if name not in PACKAGES},
        "versions": versions(),
        "seed": recipe.seed,
        "batch size": recipe.batch_size,
    }


def _result(comparison: Comparison, variants: Sequence[Variant], card: dict[str, Any], clock: Clock) -> dict[str, Any]:
    found = comparison.likelihoods()
    records = {variant.name: comparison.record(variant.name) for variant in variants}
    return {
        "card": card,
        "dense": {
            "texts": {text: text_result(of[DENSE], of[DENSE]) for text, of in found.items()},
            **tasks_result(comparison.record(DENSE)["tasks"]),
        },
        "rows": [make_row(variant, records[variant.name], found) for variant in variants],
        "shared_seconds": {
            "dense": comparison.record(DENSE)["seconds"],
            "survey for allocations": clock.laps["survey for allocations"],
            "evaluation": sum(record["evaluation_seconds"] for record in records.values()),
            "this process": sum(clock.laps.values()),
        },
    }


def _texts(sources: Sequence[str]) -> dict[str, str]:
    if not 0 < len({Path(source).stem for source in sources}) == len(sources):
        raise RecipeError(f"Evaluation texts {', '.join(sources)}: give one or more, no two with the same file name.")
    return {Path(source).stem: text_of(source) for source in sources}
