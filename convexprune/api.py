"""The user's door: `prune`."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune.adapters import (
    EMBEDDED,
    HuggingFaceModel,
    calibration_and_held_out,
    calibration_tokens,
    load,
    save,
    text_windows,
)
from convexprune.errors import CalibrationError
from convexprune.pipeline import (
    LayerSettings,
    Recipe,
    check_output,
    check_patterns,
    make_recipe,
    prune_layers,
    whole_folder,
)
from convexprune.report import OperatorReport, Report
from convexprune.solvers import AbstractSolver
from convexprune.validation import perplexity

Tell = Callable[[OperatorReport], None]
EMBEDDED_WINDOW = 256  # the tokens that the bundled model was trained on at once
EVALUATION_SAMPLES = 32  # of text that the model samples itself
PACKAGES = ("convexprune", "torch", "transformers", "numpy", "scipy", "cvxpy")


@dataclass(frozen=True, eq=False)
class PruneResult:
    """The pruned model (the very one that was given, if it was loaded), its report, and where it was written."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    report: Report
    output_dir: Path | None


def prune(
    model: str | Path | PreTrainedModel | None = None,
    solver: str | AbstractSolver = "fista",
    method: str = "convex",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    preset: str | None = None,
    quota: str = "matrix",
    dataset: Any = "self",
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_calibration_samples: int = 128,
    held_out_samples: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    error_correction: float | bool = True,
    prefix: str = "dense",
    damping: float | None = None,
    method_args: dict[str, Any] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    output_dir: str | Path | None = None,
    evaluation: str | Path | Tensor | None = None,
    progress: Callable[[int], Tell] | None = None,
) -> PruneResult:
    """Prune a language model; every convex solve is certified.

    Args:
        model: a folder, a name on the hub, or a loaded model, which is then changed in place. None: the small OPT
            model that is bundled.
        solver: "fista" (production), "cvxpy" or "scipy" (ground truth, for very small models), or your own
            `AbstractSolver`. Used by method="convex".
        method: "convex", or a baseline: "magnitude", "wanda", "sparsegpt", "fistapruner".
        sparsity: share of zeros in every operator, in [0, 1); None is 0.5, or what an N:M pattern fixes.
        pattern: "unstructured", or "N:M" for N non-zeros in every M inputs ("2:4").
        preset: "fistapruner" is the algorithm of arXiv 2408.03728 as published, for comparison.
        quota: where the share of zeros holds: in each "matrix" or in each "row" of it.
        dataset: calibration tokens: "self" (sampled from the model), "c4", "wikitext2", "ptb" or another data set of
            the hub (needs convexprune[hub]), a .txt or .jsonl path, texts, token ids as tensors, or a DataLoader.
        tokenizer: for a loaded model and a data set of text.
        num_calibration_samples: windows of `max_seq_length` tokens (None: 2048, or the model's limit if less).
        held_out_samples: windows more, on which errors are measured and nothing is fitted; None: an eighth as many,
            or what the data set has left.
        batch_size: windows in one forward pass.
        seed: of the choice of windows and of "self" sampling.
        targets: operators to prune: names, their endings, "re:" patterns, or "Linear".
        ignore: operators not to prune, as `targets`.
        error_correction: how much an operator makes up for the operators pruned before it in its layer, 0 to 1.
        prefix: which network feeds a decoder layer while it is pruned: the "dense" one, or the one "pruned" so far.
        damping: pull to the dense weight relative to the Gram matrix's diagonal; None: from the sampling noise.
        method_args: further settings of the method's class in `convexprune.pruners`.
        device: "auto" is the GPU if there is one.
        dtype: "float32", "bfloat16", "float16"; None is the checkpoint's.
        trust_remote_code: let transformers run code that a checkpoint brings.
        allow_pickle: read checkpoints that are pickles, which can run code.
        output_dir: where to write the model, `recipe.yaml` and `report.json`, whole or not at all; must be empty.
        evaluation: what to measure perplexity on, before and after: "self" (sampled from the dense model, apart from
            the calibration stream), a text file, or token windows [windows window]. None: not measured.
        progress: called with the number of operators, returns what is called with each operator's report.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    settings = dict(locals())
    source = EMBEDDED if model is None else model
    if model is None:
        settings |= {"dtype": dtype or "float32", "max_seq_length": max_seq_length or EMBEDDED_WINDOW}
    recipe = make_recipe(
        model=str(source if isinstance(source, str | Path) else source.name_or_path),
        solver=solver if isinstance(solver, str) else type(solver).__name__,
        dataset=dataset if isinstance(dataset, str) else f"{type(dataset).__name__} given by the caller",
        targets=tuple(targets),
        ignore=tuple(ignore),
        method_args=method_args or {},
        **{name: settings[name] for name in _PLAIN},
    )
    pruner = recipe.build_pruner(None if isinstance(solver, str) else solver)
    layer_settings = LayerSettings(pruner, recipe.build_pattern(), recipe.error_correction, recipe.prefix)
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        check_output(folder)
    clock = _Clock()
    loaded = load(
        source,
        device=default_device(device),
        dtype=None if recipe.dtype is None else getattr(torch, recipe.dtype),
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        targets=targets,
        ignore=ignore,
    )
    check_patterns(loaded, layer_settings)
    clock.lap("load")
    tokens, held_out = _calibration(dataset, loaded, recipe)
    clock.lap("calibration data")
    report = Report(
        recipe.model_dump(mode="json"), left_alone=dict(loaded.left_alone), environment=_environment(loaded)
    )
    windows = _evaluation_windows(evaluation, loaded, tokens.shape[1], seed)
    _evaluate(loaded, windows, report, "dense", clock)
    operators = sum(len(layer.operators) for layer in loaded.layers)
    tell = progress(operators) if progress is not None else lambda _: None

    def record(operator: OperatorReport) -> None:
        report.operators.append(operator)
        tell(operator)

    place = loaded.device
    prune_layers(loaded, tokens.to(place), held_out.to(place), batch_size, layer_settings, record)
    clock.lap("prune")
    _evaluate(loaded, windows, report, "pruned", clock)
    report.seconds = clock.laps
    if folder is not None:
        write_result(folder, loaded, recipe, report)
    return PruneResult(loaded.model, loaded.tokenizer, report, folder)


_PLAIN = (
    "method", "preset", "sparsity", "pattern", "quota", "error_correction", "prefix", "damping",
    "num_calibration_samples", "held_out_samples", "max_seq_length", "batch_size", "seed", "device", "dtype",
)  # fmt: skip


def write_result(folder: Path, model: HuggingFaceModel, recipe: Recipe, report: Report) -> None:
    """Write model, tokenizer, `recipe.yaml` and `report.json` to `folder`, whole or not at all.

    Raises:
        OutputError: the folder is not empty.
    """
    with whole_folder(folder) as temporary:
        save(model, temporary)
        (temporary / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        (temporary / "report.json").write_text(report.to_json())


class _Clock:
    """Seconds of each phase of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def _calibration(dataset: Any, model: HuggingFaceModel, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The windows to fit and those held out.

    Raises:
        CalibrationError: the data set is too small for the samples asked.
    """
    tokens, held_out = calibration_and_held_out(
        dataset,
        model,
        num_samples=recipe.num_calibration_samples,
        spare=recipe.spare_samples,
        max_seq_length=recipe.max_seq_length,
        seed=recipe.seed,
    )
    if len(held_out) < (recipe.held_out_samples or 0):
        raise CalibrationError(
            f"The data set has {len(held_out)} windows left after {len(tokens)} for calibration; "
            f"held_out_samples={recipe.held_out_samples} were asked for. Ask for fewer, or leave it out."
        )
    return tokens, held_out


def _evaluation_windows(
    evaluation: str | Path | Tensor | None, model: HuggingFaceModel, window: int, seed: int
) -> Tensor | None:
    if evaluation is None or isinstance(evaluation, Tensor):
        return evaluation
    if evaluation == "self":
        settings = {"num_samples": EVALUATION_SAMPLES, "max_seq_length": window, "seed": seed}
        return calibration_tokens("self", model, split="evaluation", **settings)
    return text_windows(Path(evaluation), model, window)


def _evaluate(model: HuggingFaceModel, windows: Tensor | None, report: Report, name: str, clock: _Clock) -> None:
    if windows is not None:
        report.perplexity[name] = vars(perplexity(model.model, windows))
        clock.lap("evaluation")


def default_device(name: str) -> str:
    """The device of that name; "auto" is the GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _environment(model: HuggingFaceModel) -> dict[str, Any]:
    """What the result depends on besides the recipe."""
    packages = {name: version(name) for name in PACKAGES}
    return packages | {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": str(model.device),
        "dtype": str(model.model.dtype).removeprefix("torch."),
    }
