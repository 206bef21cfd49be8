"""The user's door: `prune`."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
    save_from_store,
    text_windows,
)
from convexprune.errors import CalibrationError, RecipeError
from convexprune.pipeline import (
    AbstractExecutor,
    FolderStore,
    Job,
    LayerSettings,
    Recipe,
    RecordedCalls,
    RunFolder,
    Work,
    carried,
    check_patterns,
    identity,
    make_executor,
    make_recipe,
    prune_in_folder,
    prune_in_place,
)
from convexprune.pipeline import threads as use_threads
from convexprune.pipeline.files import appearing, write
from convexprune.report import OperatorReport, Report
from convexprune.solvers import AbstractSolver
from convexprune.validation import perplexity, perplexity_of

Tell = Callable[[OperatorReport], None]
Windows = Mapping[str, Tensor]  # token ids [windows window] by what they are for
FITTED = ("calibration", "held_out")
EMBEDDED_WINDOW = 256  # the tokens that the bundled model was trained on at once
EVALUATION_SAMPLES = 32  # of text that the model samples itself
PACKAGES = ("convexprune", "torch", "transformers", "numpy", "scipy", "cvxpy")


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What a run gave: its report, and where the pruned model was written, if anywhere."""

    report: Report
    tokenizer: PreTrainedTokenizerBase | None
    output_dir: Path | None
    _model: Callable[[], PreTrainedModel]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The pruned model: the very one that was given if it was loaded, else read from `output_dir` now."""
        return self._model()


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
    refit: bool | None = None,
    method_args: dict[str, Any] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    output_dir: str | Path | None = None,
    resume: bool = False,
    executor: str = "serial",
    workers: int | None = None,
    threads: int | None = None,
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
        refit: least squares on the support that was found, for any method or for none; None: as the method has it.
        method_args: further settings of the method's class in `convexprune.pruners`.
        device: "auto" is the GPU if there is one.
        dtype: "float32", "bfloat16", "float16"; None is the checkpoint's.
        trust_remote_code: let transformers run code that a checkpoint brings.
        allow_pickle: read checkpoints that are pickles, which can run code.
        output_dir: where to write the model, `recipe.yaml` and `report.json`; must be empty. The model is then never
            whole in memory, if its checkpoint allows it (see docs/runs.md), and the run can be interrupted.
        resume: go on with the unfinished run in `output_dir`, if there is one; a finished one is handed back.
        executor: who prunes: "serial" (this process), "pool" (processes on this machine, one for each GPU), "ranks"
            (of torchrun or SLURM, all started with this same call), or "ray" (needs convexprune[ray]). All but the
            first need an `output_dir` that all of them see, and a model that can be opened there.
        workers: how many, for "pool" and "ray"; None: one for each GPU, or as many as the cores have room for.
        threads: that a layer is pruned on; None: what torch has, divided by the workers. The bits depend on it.
        evaluation: what to measure perplexity on, before and after: "self" (sampled from the dense model, apart from
            the calibration stream), a text file, or token windows [windows window]. None: not measured.
        progress: called with the number of operators, returns what is called with each operator's report.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    settings = dict(locals())
    if model is None:
        settings |= {"model": EMBEDDED, "dtype": dtype or "float32"}
        settings |= {"max_seq_length": max_seq_length or EMBEDDED_WINDOW}
    request = _Request(settings)
    return request.in_memory() if output_dir is None else request.in_folder(Path(output_dir), resume)


class _Request:
    """A call of `prune`, checked: its recipe, and how to open its model."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.source, solver = settings["model"], settings["solver"]
        dataset = settings["dataset"]
        self.recipe = make_recipe(
            model=str(self.source if isinstance(self.source, str | Path) else self.source.name_or_path),
            solver=solver if isinstance(solver, str) else type(solver).__name__,
            dataset=dataset if isinstance(dataset, str) else f"{type(dataset).__name__} given by the caller",
            targets=tuple(settings["targets"]),
            ignore=tuple(settings["ignore"]),
            method_args=settings["method_args"] or {},
            **{name: settings[name] for name in _PLAIN},
        )
        recipe = self.recipe
        pruner = recipe.build_pruner(None if isinstance(solver, str) else solver)
        self.layers = LayerSettings(pruner, recipe.build_pattern(), recipe.error_correction, recipe.prefix)
        self.dataset, self.evaluation, self.progress = dataset, settings["evaluation"], settings["progress"]
        self.device = default_device(recipe.device)
        self.executor = _executor(settings, self.device, recipe.threads)
        if self.executor.rank is not None and self.device == "cuda":
            self.device = f"cuda:{self.executor.rank % torch.cuda.device_count()}"
        self.threads = recipe.threads or max(1, torch.get_num_threads() // self.executor.processes)
        self.given_tokenizer = settings["tokenizer"]
        self.open = partial(
            load,
            self.source,
            dtype=None if recipe.dtype is None else getattr(torch, recipe.dtype),
            **{name: settings[name] for name in _OPENING},
        )
        self.clock = _Clock()

    def in_memory(self) -> PruneResult:
        """Prune the loaded model in place."""
        loaded = self.open(device=self.device)
        check_patterns(loaded, self.layers)
        self.clock.lap("load")
        windows = self._windows(loaded, {})
        report = self._report(loaded)
        self._evaluate(report, "dense", loaded, windows)
        tell = self._tell(loaded)

        def record(operator: OperatorReport) -> None:
            report.operators.append(operator)
            tell(operator)

        with use_threads(self.threads):
            prune_in_place(loaded, self._work(windows), record)
        self.clock.lap("prune")
        self._evaluate(report, "pruned", loaded, windows)
        report.seconds = self.clock.laps
        return PruneResult(report, loaded.tokenizer, None, lambda: loaded.model)

    def in_folder(self, path: Path, resume: bool) -> PruneResult:
        """Prune layer by layer from files to files, or what of it is still to do."""
        folder = RunFolder(path)
        folder.check(resume or self.executor.rank is not None)
        loaded = self.open(device=self.device, stream=True)
        check_patterns(loaded, self.layers)
        self.clock.lap("load")
        sampled = folder.tokens() if resume and folder.is_unfinished else {}
        windows = self._windows(loaded, sampled)
        report = self._report(loaded)
        report.identity = identity(
            self.recipe,
            self.layers,
            loaded.checksums(),
            {name: windows[name] for name in FITTED},
            device=torch.device(self.device).type,
            dtype=report.environment["dtype"],
            threads=self.threads,
        )
        with folder.opened(report.identity, windows, self.executor.rank):
            written = not folder.is_finished and self._run(folder, loaded, windows, report)
        if not loaded.streams and not written:  # it is to be pruned in place, whoever has done the work
            pruned = _read(path, self.device)
            for layer in loaded.layers:
                loaded.load_state(layer, pruned.get_submodule(layer.name).state_dict())
        model = partial(_read, path, self.device) if loaded.streams else lambda: loaded.model
        return PruneResult(folder.report(), loaded.tokenizer, path, model)

    def _run(self, folder: RunFolder, loaded: HuggingFaceModel, windows: Windows, report: Report) -> bool:
        """Prune what is not yet, and write the result unless another rank does; whether this one has."""
        if not loaded.streams:  # once it is pruned in place, it is too late
            self._evaluate(report, "dense", loaded, windows)
        store = FolderStore(folder.work, len(loaded.layers), self.device)
        job = Job(folder.work, self._work(windows), partial(self.open, stream=True), self.threads)
        prune_in_folder(self.executor, job, loaded, store, self._tell(loaded))
        self.clock.lap("prune")
        with folder.alone() as unfinished:
            if unfinished:
                self._write(folder, loaded, store, windows, report)
        return unfinished

    def _write(
        self, folder: RunFolder, loaded: HuggingFaceModel, store: FolderStore, windows: Windows, report: Report
    ) -> None:
        """Assemble the result from the finished layers."""
        store.require_whole()
        report.operators = [o for number in range(store.count) for o in store.reports(number)]
        if loaded.streams:
            self._evaluate_streamed(report, "dense", loaded, windows, store, None)
            self._evaluate_streamed(report, "pruned", loaded, windows, store, store)
        else:
            store.restore(loaded)
            self._evaluate(report, "pruned", loaded, windows)
        save_from_store(loaded, store, folder.folder, self.given_tokenizer)
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        with appearing(folder.folder / "recipe.yaml") as file:
            write(file, text.encode())
        self.clock.lap("write")
        report.seconds = self.clock.laps
        folder.finish(report)

    def _work(self, windows: Windows) -> Work:
        return Work(windows["calibration"], windows["held_out"], self.recipe.batch_size, self.layers)

    def _windows(self, model: HuggingFaceModel, sampled: Windows) -> Windows:
        """The windows to fit, those held out, and those to evaluate on; what was `sampled` before is not again.

        A model has to be whole in memory to sample text: it is then loaded for that, and let go.
        """
        windows = dict(sampled) if is_self(self.dataset) else {}
        samples = [is_self(self.dataset) and not windows, is_self(self.evaluation) and "evaluation" not in sampled]
        sampler = self.open(device=self.device) if model.streams and any(samples) else model
        if "calibration" not in windows:
            windows["calibration"], windows["held_out"] = _calibration(self.dataset, sampler, self.recipe)
        self.clock.lap("calibration data")
        if self.evaluation is not None:
            length = windows["calibration"].shape[1]
            if is_self(self.evaluation) and "evaluation" in sampled:
                windows["evaluation"] = sampled["evaluation"]
            else:
                windows["evaluation"] = _evaluation_windows(self.evaluation, sampler, length, self.recipe.seed)
        return windows

    def _report(self, loaded: HuggingFaceModel) -> Report:
        environment = _environment(loaded) | {"threads": self.threads}
        return Report(self.recipe.model_dump(mode="json"), dict(loaded.left_alone), environment)

    def _tell(self, loaded: HuggingFaceModel) -> Tell:
        operators = sum(len(layer.operators) for layer in loaded.layers)
        return self.progress(operators) if self.progress is not None else lambda _: None

    def _evaluate(self, report: Report, name: str, loaded: HuggingFaceModel, windows: Windows) -> None:
        if "evaluation" in windows:
            report.perplexity[name] = vars(perplexity(loaded.model, windows["evaluation"]))
            self.clock.lap("evaluation")

    def _evaluate_streamed(
        self,
        report: Report,
        name: str,
        loaded: HuggingFaceModel,
        windows: Windows,
        store: FolderStore,
        pruned: FolderStore | None,
    ) -> None:
        """The same, layer by layer."""
        if "evaluation" not in windows:
            return
        batches = list(windows["evaluation"].split(1))
        calls = RecordedCalls(loaded, batches)
        with store.scratch(store.count) as record:
            first = record()
            for batch in batches:
                first.append(loaded.first_inputs(batch))
            last = iter(carried(loaded, calls, first, range(store.count), record, pruned))
            found = perplexity_of(lambda batch: loaded.logits(batch, next(last)), windows["evaluation"])
        report.perplexity[name] = vars(found)
        self.clock.lap("evaluation")


_OPENING = ("tokenizer", "trust_remote_code", "allow_pickle", "targets", "ignore")
_PLAIN = (
    "method", "preset", "sparsity", "pattern", "quota", "error_correction", "prefix", "damping", "refit",
    "num_calibration_samples", "held_out_samples", "max_seq_length", "batch_size", "seed", "device", "dtype", "threads",
)  # fmt: skip


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


def _evaluation_windows(evaluation: str | Path | Tensor, model: HuggingFaceModel, window: int, seed: int) -> Tensor:
    if isinstance(evaluation, Tensor):
        return evaluation
    if evaluation == "self":
        settings = {"num_samples": EVALUATION_SAMPLES, "max_seq_length": window, "seed": seed}
        return calibration_tokens("self", model, split="evaluation", **settings)
    return text_windows(Path(evaluation), model, window)


def is_self(text: Any) -> bool:
    """Whether it asks for text that the model samples itself."""
    return isinstance(text, str) and text == "self"


def _executor(settings: dict[str, Any], device: str, threads: int | None) -> AbstractExecutor:
    workers = settings["workers"] or default_workers(device, threads)
    if settings["executor"] != "serial":
        _check_spread(settings)
    return make_executor(settings["executor"], workers, device)


def _check_spread(settings: dict[str, Any]) -> None:
    """Refuse what cannot be spread over processes.

    Raises:
        RecipeError: the run has no folder to meet in, or its layers are pruned one after another, or its model is in
            the memory of this process.
    """
    name = settings["executor"]
    if settings["output_dir"] is None:
        raise RecipeError(f"executor={name!r}: the workers meet in the output folder. Give output_dir.")
    if settings["prefix"] == "pruned":
        raise RecipeError(
            f"executor={name!r} with prefix='pruned': each layer waits for the one before it to be pruned, so they "
            "cannot be spread. Use executor='serial', or prefix='dense'."
        )
    if name != "ranks" and isinstance(settings["model"], PreTrainedModel):
        raise RecipeError(f"executor={name!r}: the workers cannot open a model that is loaded. Give its folder.")


def _read(folder: Path, device: str) -> PreTrainedModel:
    return load(folder, device=device, allow_pickle=False).model


def default_device(name: str) -> str:
    """The device of that name; "auto" is the GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_workers(device: str, threads: int | None) -> int:
    """One for each GPU, or as many as the cores have room for."""
    if device == "cuda":
        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // (threads or 1))


def _environment(model: HuggingFaceModel) -> dict[str, Any]:
    """What the result depends on besides the recipe."""
    packages = {name: version(name) for name in PACKAGES}
    return packages | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(model.device),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "loading": "layer by layer" if model.streams else f"whole: {model.whole_because}",
    }
