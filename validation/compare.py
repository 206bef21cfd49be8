"""The door to comparisons: from names and a folder to `compare.json`, `report.md` and plots, resumable."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from convexprune.adapters import (
    EMBEDDED,
    EMBEDDED_WINDOW,
    HuggingFaceModel,
    calibration_and_held_out,
    check_dataset,
    load,
    text_windows,
)
from convexprune.adapters.allocating import allotments
from convexprune.errors import OutputError, RecipeError, require_at_least
from convexprune.pipeline import LayerSettings, check_output, check_patterns, checksum
from convexprune.pipeline.files import write_json
from convexprune.pipeline.machine import PACKAGES, Clock, default_device, installation, versions
from convexprune.pipeline.place import output_folder
from convexprune.pipeline.tensors import raw
from convexprune.progress import begin
from convexprune.recipe import make_recipe, spare_samples
from convexprune.report import finite

from .plots import draw, will_draw
from .results import make_row, markdown, text_result
from .side_by_side import DENSE, Comparison, Tokens
from .states import Store
from .texts import text_of
from .variants import Variant, make_variants


def compare(
    model: str | Path | None,
    methods: Sequence[str],
    sparsities: Sequence[float],
    patterns: Sequence[str],
    conventions: Sequence[str],
    output: Path,
    *,
    allocations: Sequence[str] = ("own",),
    quota: str = "own",
    dataset: Any = "self",
    num_calibration_samples: int = 64,
    held_out_samples: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    eval_texts: Sequence[str] = ("python-docs", "licences"),
    eval_window: int | None = None,
    eval_windows: int | None = 20,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    device: str = "cpu",
    dtype: str | None = "float32",
    resume: bool = False,
    plots: bool | None = None,
    command: str = "",
    progress: Callable[[int], Callable[[str], None]] | None = None,
) -> dict[str, Any]:
    """Compare methods on the same tokens; the result is what `compare.json` in `output` holds.

    Args:
        model: a folder or a name on the hub; None is the small OPT that is bundled.
        methods, sparsities, patterns, conventions, allocations, quota: see `make_variants`.
        output: the folder for the result; must be empty, unless `resume`. Beside the result it holds `work` meanwhile.
        dataset, num_calibration_samples, held_out_samples, max_seq_length, batch_size, seed, targets, ignore,
            device, dtype: see `convexprune.prune`.
        eval_texts: .txt or .jsonl files, or the names of texts that installations carry (`validation.texts.TEXTS`).
        eval_window: tokens of an evaluation window (None: 1024, or the model's limit if less).
        eval_windows: how many windows of each text, from its beginning; None: all.
        resume: go on with an interrupted comparison; its settings must be the same.
        plots: draw them, which needs matplotlib; None: if it is installed.
        command: what to state as the way to reproduce the result.
        progress: called with the number of steps, returns what is called with a description of each step done.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    shared = make_recipe(
        model="", num_calibration_samples=num_calibration_samples, held_out_samples=held_out_samples,
        max_seq_length=max_seq_length, batch_size=batch_size, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    place = {"device": default_device(shared.device), "dtype": shared.torch_dtype}
    require_at_least(2, eval_window=eval_window)
    require_at_least(1, eval_windows=eval_windows)
    variants = make_variants(methods, sparsities, patterns, conventions, quota, allocations)
    drawing = will_draw(plots)
    check_dataset(dataset)
    output = output_folder(output, model)
    work = output / "work"
    if resume and not (work / "identity.json").is_file():
        raise OutputError(f"{output} holds no comparison that was interrupted, so there is nothing to resume.")
    if not resume:
        check_output(output)
    texts = _texts(eval_texts)
    begin("loading the model")
    loaded = load(EMBEDDED if model is None else model, **place, targets=targets, ignore=ignore)
    settings = {variant.name: variant.layer_settings() for variant in variants}
    _check(loaded, settings)
    length = max_seq_length or (EMBEDDED_WINDOW if model is None else None)
    spare = spare_samples(num_calibration_samples, held_out_samples)
    windows = {name: text_windows(text, loaded, eval_window, name)[:eval_windows] for name, text in texts.items()}
    fitted = calibration_and_held_out(
        dataset, loaded, num_samples=num_calibration_samples, spare=spare, max_seq_length=length, seed=seed
    )
    tokens = Tokens(*fitted, windows)
    card = _card(loaded, tokens) | {
        "model": "the bundled OPT" if model is None else Path(model).name,
        "seed": seed,
        "batch size": batch_size,
        "dataset": str(dataset) if isinstance(dataset, str | Path) else f"{type(dataset).__name__} given by the caller",
    }
    recipes = {v.name: v.recipe().model_dump(mode="json") for v in variants}
    _claim(work / "identity.json", json.loads(json.dumps(card | {"recipes": recipes})), resume)
    clock = Clock()
    asked = {v.name: (v.allocation, v.recipe().build_pattern()) for v in variants}
    found = allotments(loaded, *fitted, list(asked.values()), batch_size)
    for (name, (_, pattern)), allotment in zip(asked.items(), found, strict=True):
        settings[name] = allotment.allotted(settings[name], pattern)
    _check(loaded, settings)
    clock.lap("survey for allocations")
    comparison = Comparison(loaded, tokens, settings, Store(work, loaded.device), batch_size)
    comparison.run(progress(comparison.units) if progress is not None else lambda _: None)
    clock.lap("layers")
    result = _result(comparison, variants, card | {"command": command, "machine": _machine(loaded)}, clock)
    write_json(output / "compare.json", finite(result))
    drawn = draw(result, output) if drawing else []
    (output / "report.md").write_text(markdown(result, drawn))
    shutil.rmtree(work)
    return result


def _check(model: HuggingFaceModel, settings: Mapping[str, LayerSettings]) -> None:
    for each in settings.values():
        check_patterns(model.layers, each)


def _card(model: HuggingFaceModel, tokens: Tokens) -> dict[str, Any]:
    """What a result depends on beside the settings: tokens, weights, arithmetic, versions."""
    installed = installation(model.device)
    return {
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "tokens": {name: f"{ids.shape[0]} x {ids.shape[1]}" for name, ids in tokens.streams.items()},
        "hashes": {"model": _model_hash(model)} | {name: checksum(ids) for name, ids in tokens.streams.items()},
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        **{name: value for name, value in installed.items() if name not in PACKAGES},
        "versions": versions(),
    }


def _machine(model: HuggingFaceModel) -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {model.device}"


def _result(comparison: Comparison, variants: Sequence[Variant], card: dict[str, Any], clock: Clock) -> dict[str, Any]:
    begin("evaluating")
    found = comparison.likelihoods()
    clock.lap("evaluation")
    return {
        "card": card,
        "dense": {"texts": {text: text_result(of[DENSE], of[DENSE]) for text, of in found.items()}},
        "rows": [make_row(variant, comparison.records(variant.name), found) for variant in variants],
        "shared_seconds": {
            "dense": sum(record["seconds"] for record in comparison.records(DENSE)),
            "survey for allocations": clock.laps["survey for allocations"],
            "evaluation": clock.laps["evaluation"],
            "this process": sum(clock.laps.values()),
        },
    }


def _texts(sources: Sequence[str]) -> dict[str, str]:
    """The texts by a short name.

    Raises:
        RecipeError: there is none, or two have one name.
    """
    if not 0 < len({Path(source).stem for source in sources}) == len(sources):
        raise RecipeError(f"Evaluation texts {', '.join(sources)}: give one or more, no two with the same file name.")
    return {Path(source).stem: text_of(source) for source in sources}


def _claim(path: Path, identity: dict[str, Any], resume: bool) -> None:
    """Write down what is compared; or, to resume, see that it is the same.

    Raises:
        RecipeError: it is another comparison.
    """
    if not resume:
        write_json(path, identity)
        return
    before = json.loads(path.read_text())
    differing = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
    if differing:
        raise RecipeError(
            f"{path.parent.parent} holds another comparison: {', '.join(differing)} differ. Give the settings that it "
            "began with, or another output folder."
        )


def _model_hash(model: HuggingFaceModel) -> str:
    """Of all parameters, by name, as they are in memory."""
    total = hashlib.sha256()
    for name, parameter in model.model.named_parameters():
        total.update(name.encode())
        total.update(raw(parameter))
    return total.hexdigest()
