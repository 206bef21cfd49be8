"""What a call of `prune` does: opens the model, draws the tokens, prunes in memory or in a folder, and reports."""

import logging
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from convexprune._api.result import PruneResult
from convexprune._api.run_warnings import run_warnings
from convexprune._api.windows import OF_DATASET, Sources, Windows, is_self, name_of_text
from convexprune._api.workers import executor_for, team_size
from convexprune._container.folder import discard_packs, holds_pack, pack_in_place, plain_checksum
from convexprune._device.machine import (
    Clock,
    check_threads,
    default_device,
    installation,
    processor,
    versions,
)
from convexprune._device.machine import threads as use_threads
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.steps.prune import Work
from convexprune._layerwise.steps.survey import WEIGHED
from convexprune._progress import begin
from convexprune._recipe_file import given, write_recipe
from convexprune._runs.folder import RunFolder
from convexprune._runs.identity import identity
from convexprune._runs.run import check_patterns, prune_in_folder, prune_in_place
from convexprune._runs.worker import Job
from convexprune._schema.functions import Call
from convexprune.adapters import (
    BUNDLED,
    EMBEDDED,
    HuggingFaceModel,
    given_tokenizer,
    load,
    reopen,
    save_from_store,
)
from convexprune.adapters._allocating import allocate
from convexprune.adapters._checkpoints.admission import refuse_headless
from convexprune.adapters._checkpoints.packed import load as load_packed
from convexprune.adapters._checkpoints.written import require_written
from convexprune.errors import RecipeError
from convexprune.recipe import make_recipe
from convexprune.report import OnOperator, OperatorReport, Report
from convexprune.solvers import AbstractSolver, solver_names
from convexprune.validation import perplexity, streamed_perplexity

logger = logging.getLogger(__name__)


class Request:
    """A call of `prune`, checked: its recipe, its executor, and how to open its model.

    Args:
        settings: those of the recipe, by name, and the model and texts as they were given.
        call: those that no recipe holds.
    """

    def __init__(self, settings: dict[str, Any], call: Call) -> None:
        self.source, solver = settings["model"], settings.get("solver")
        own = None if solver is None or isinstance(solver, str) else _require_solver(solver)
        texts = {name: settings[name] for name in ("dataset", "evaluation") if name in settings}
        named = [name for name, text in texts.items() if name == "dataset" or text is not None]
        names: dict[str, Any] = {name: name_of_text(texts[name]) for name in named}
        names |= {"model": name_of(self.source)} | ({} if own is None else {"solver": type(own).__name__})
        self.recipe = recipe = make_recipe(**settings | names)
        self.layers = recipe.layer_settings(recipe.build_pruner(own), bound_rows=recipe.bound_rows)
        self.sources = Sources(texts.get("dataset", recipe.dataset), texts.get("evaluation"))
        self.device = default_device(recipe.device)
        check_threads(recipe.threads)
        self.sources.check()
        self.call, self.progress = call, call.progress
        self.executor = executor_for(call, recipe, self.source, self.device)
        self.team_size = team_size(recipe, self.executor)
        if self.executor.rank is not None and self.device == "cuda":
            self.device = f"cuda:{self.executor.rank % torch.cuda.device_count()}"
        self.threads = recipe.threads or max(1, torch.get_num_threads() // self.executor.processes)
        self.given_tokenizer = given_tokenizer(call.tokenizer)
        self.installed = installation(self.device)
        self.open = partial(
            load,
            self.source,
            dtype=recipe.torch_dtype,
            tokenizer=self.given_tokenizer,
            trust_remote_code=call.trust_remote_code,
            allow_pickle=call.allow_pickle,
            targets=recipe.targets,
            ignore=recipe.ignore,
        )
        self.clock = Clock()

    def in_memory(self) -> PruneResult:
        """Prune the loaded model in place; if that fails, a model that was given loaded is as it was."""
        begin("loading the model")
        with self.open(device=self.device).lent(undo=isinstance(self.source, PreTrainedModel)) as loaded:
            return self._in_memory(loaded)

    def _in_memory(self, loaded: HuggingFaceModel) -> PruneResult:
        self._check(loaded)
        self.clock.lap("load")
        windows = self._windows(loaded, {})
        report = self._report(loaded, windows)
        self._evaluate(report, "dense", loaded, windows)
        with use_threads(self.threads):
            self._allocate(loaded, windows, report)
            on_operator = self._on_operator(loaded)

            def record(operator: OperatorReport) -> None:
                report.operators.append(operator)
                on_operator(operator)

            prune_in_place(loaded, self._work(windows), record)
        self.clock.lap("prune")
        self._evaluate(report, "pruned", loaded, windows)
        self._warn(report, report.sparser_before)
        report.seconds = self.clock.laps
        return PruneResult(report=report, tokenizer=loaded.tokenizer, output_dir=None, _model=lambda: loaded.model)

    def in_folder(self, path: Path, resume: bool) -> PruneResult:
        """Prune layer by layer from files to files, or what of it is still to do.

        Args:
            path: of the run's folder.
            resume: whether to go on with a run that is there.

        Returns:
            The result, in the folder.
        """
        folder = RunFolder(path)
        folder.check(resume or self.executor.rank is not None)
        if folder.is_finished and not self.executor.rank:
            self._check_finished(folder)
        begin("loading the model")
        opened = self.open(device=self.device, stream=True)
        with opened.lent(undo=isinstance(self.source, PreTrainedModel)) as loaded:
            return self._in_folder(folder, loaded, resume)

    def _in_folder(self, folder: RunFolder, loaded: HuggingFaceModel, resume: bool) -> PruneResult:
        self._check(loaded)
        begin("reading the weights")
        self.origin = loaded.origin()  # weights that are not finite are found here, before any work
        self.clock.lap("load")
        known = folder.sampled() if resume and self.sources.has_sampled and folder.is_unfinished else {}
        windows = self._windows(loaded, known)
        report = self._report(loaded, windows)
        report.environment["folder"] = str(folder.folder.absolute())
        report.identity = identity(
            self.recipe.model_dump(mode="json"),
            self.layers,
            self.origin.checksums,
            {name: windows[name] for name in OF_DATASET},
            self.installed,
            device=torch.device(self.device).type,
            dtype=report.environment["dtype"],
            threads=self.threads,
            ranks=self.team_size,
        )
        with folder.opened(report.identity, self.sources.sampled(windows), self.executor.rank):
            written = not folder.is_finished and self._run(folder, loaded, windows, report)
        if not loaded.streams and not written:  # it is to be pruned in place, whoever has done the work
            pruned = self._read(folder.folder)
            for layer in loaded.layers:
                loaded.load_state(layer, pruned.get_submodule(layer.name).state_dict())
        model = partial(self._read, folder.folder) if loaded.streams else lambda: loaded.model
        return PruneResult(report=folder.report(), tokenizer=loaded.tokenizer, output_dir=folder.folder, _model=model)

    def _check(self, loaded: HuggingFaceModel) -> None:
        """Refuse, before any work, what the model does not allow."""
        check_patterns(loaded.layers, self.layers)
        needs = {
            f"allocation={self.recipe.allocation!r}": (self.recipe.allocation in WEIGHED, "take allocation='uniform'"),
            'dataset="self"': (is_self(self.sources.dataset), "another data set"),
            "the perplexity": (self.sources.evaluation is not None, "leave evaluation out"),
        }
        refuse_headless(loaded.model, {what: instead for what, (needed, instead) in needs.items() if needed})

    def _run(self, folder: RunFolder, loaded: HuggingFaceModel, windows: Windows, report: Report) -> bool:
        """Prune what is not yet, and write the result unless another rank does; whether this one has."""
        if not loaded.streams:  # once it is pruned in place, it is too late
            self._evaluate(report, "dense", loaded, windows)
        store = FolderStore(folder.work, len(loaded.layers), self.device)
        with use_threads(self.threads):
            self._allocate(loaded, windows, report, store)
        on_operator = self._on_operator(loaded)
        opened = partial(reopen, self.open, self.origin)
        job = Job(folder.work, self._work(windows), opened, self.threads, self.installed)
        prune_in_folder(self.executor, job, loaded, store, on_operator)
        self.clock.lap("prune")
        with folder.alone() as unfinished:
            if unfinished:
                self._write(folder, loaded, store, windows, report)
        return unfinished

    def _write(
        self, folder: RunFolder, loaded: HuggingFaceModel, store: FolderStore, windows: Windows, report: Report
    ) -> None:
        """Assemble the result from the finished layers."""
        begin("looking at what is finished")
        store.require_whole()
        report.operators = [o for number in range(store.count) for o in store.reports(number)]
        self._warn(report, report.sparser_before)
        if loaded.streams:
            for name, pruned in (("dense", None), ("pruned", store)):
                if "evaluation" in windows:
                    found = streamed_perplexity(loaded, windows["evaluation"], store, pruned)
                    report.perplexity[name] = vars(found)
                    self.clock.lap("evaluation")
        else:
            store.restore(loaded)
            self._evaluate(report, "pruned", loaded, windows)
        begin("writing the result")
        discard_packs(folder.folder)
        written = save_from_store(loaded, store, folder.folder, self.given_tokenizer)
        recipe = write_recipe(self.recipe, folder.folder)
        require_written(loaded, folder.folder, report.operators)
        report.files = folder.checksums([*written, recipe])
        if self.call.pack:
            packed = pack_in_place(folder.folder, report.files)
            report.packed = {"before": packed.before, "after": packed.after, "bits": packed.bits}
        self.clock.lap("write")
        report.seconds = self.clock.laps
        folder.finish(report)

    def _check_finished(self, folder: RunFolder) -> None:
        """See that a result that is handed back is whole, and say so if it is not of the text to evaluate on now."""
        folder.require_whole(plain_checksum)
        if self.call.pack and not holds_pack(folder.folder):
            logger.warning("%s is finished without pack. For one: convexprune pack %s DIR", *2 * [folder.folder])
        measured = folder.report().recipe.get("evaluation")
        if self.recipe.evaluation not in (None, measured):
            logger.warning(
                "%s is finished, and its report is of the text %s: %s is not evaluated. For its perplexity: "
                "convexprune eval %s --text %s",
                folder.folder, measured, self.recipe.evaluation, folder.folder, self.recipe.evaluation,
            )  # fmt: skip

    def _allocate(
        self, loaded: HuggingFaceModel, windows: Windows, report: Report, store: FolderStore | None = None
    ) -> None:
        """Spread the zeros as the recipe says, or as they were spread when the run in the store began."""
        if self.recipe.allocation != "uniform":
            found = allocate(loaded, windows["calibration"], windows["held_out"], self.recipe, store)
            self.layers = found.apply_to(self.layers, self.recipe.build_pattern())
            check_patterns(loaded.layers, self.layers)
            report.allocation = {"cost": found.cost, "gap": found.gap}
            self.clock.lap("allocation")

    def _read(self, folder: Path) -> PreTrainedModel:
        return load_packed(folder, device=self.device, trust_remote_code=self.call.trust_remote_code)

    def _work(self, windows: Windows) -> Work:
        return Work(windows["calibration"], windows["held_out"], self.recipe.batch_size, self.layers)

    def _windows(self, loaded: HuggingFaceModel, known: Windows) -> Windows:
        windows = self.sources.draw(loaded, self.recipe, known, lambda: self.open(device=self.device))
        self.clock.lap("calibration data")
        return windows

    def _report(self, loaded: HuggingFaceModel, windows: Windows) -> Report:
        environment = _environment(loaded) | {"threads": self.threads}
        report = Report(self.recipe.model_dump(mode="json"), dict(loaded.left_alone), environment)
        for warning in run_warnings(loaded, windows, self.recipe):
            self._warn(report, warning)
        return report

    def _warn(self, report: Report, warning: str | None) -> None:
        """Tell the user, once, and the report."""
        if warning is not None:
            report.warnings.append(warning)
            if not self.executor.rank:
                logger.warning(warning)

    def _on_operator(self, loaded: HuggingFaceModel) -> OnOperator:
        operators = sum(len(layer.operators) for layer in loaded.layers)
        return self.progress(operators) if self.progress is not None else lambda _: None

    def _evaluate(self, report: Report, name: str, loaded: HuggingFaceModel, windows: Windows) -> None:
        if "evaluation" in windows:
            report.perplexity[name] = vars(perplexity(loaded.model, windows["evaluation"]))
            self.clock.lap("evaluation")


def _require_solver(solver: Any) -> AbstractSolver:
    """A user's own solver.

    Raises:
        RecipeError: it is none.
    """
    if isinstance(solver, AbstractSolver):
        return solver
    found = f"the class {solver.__name__}" if isinstance(solver, type) else f"a {type(solver).__name__}"
    raise RecipeError(
        f"solver is {found}. Accepted: {', '.join(solver_names())}, or an object of a class of your own that derives "
        "from convexprune.AbstractSolver."
    )


def name_of(source: Any) -> str:
    """Of a model, for its recipe: the bundled one's name, a path in full, a name on the hub, or what was given.

    Args:
        source: a name, a path or a loaded model.

    Returns:
        What a recipe says of it.
    """
    text = source.name_or_path if isinstance(source, PreTrainedModel) else source
    if not isinstance(text, str | Path) or not text:  # a compiled model has no truth value
        return given(source)
    path = Path(text).expanduser()
    return BUNDLED if path == EMBEDDED else str(path.absolute()) if path.exists() else str(text)


def _environment(model: HuggingFaceModel) -> dict[str, Any]:
    """What the result depends on besides the recipe."""
    return versions() | {
        "machine": platform.machine(),
        "device": str(model.device),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        **processor(model.device),
        "loading": "layer by layer" if model.streams else f"whole: {model.whole_because}",
    }
