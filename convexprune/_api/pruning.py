"""The work of `prune`: in memory, in place; or layer by layer from files to files, resumable."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from convexprune import adapters
from convexprune._api.given import OF_DATASET, Windows
from convexprune._api.request import Request
from convexprune._api.result import PruneResult, held
from convexprune._container.folder import holds_pack, pack_in_place
from convexprune._container.provenance import plain_checksum, require_only_result
from convexprune._device.capabilities import is_host
from convexprune._device.machine import threads as use_threads
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.work import prune_claimed
from convexprune._progress import FORECAST, begin
from convexprune._recipe_file import write_recipe
from convexprune._rendering.card import mark_sparse, with_sparsity, write_card
from convexprune._rendering.page import page
from convexprune._runs.executors import Job
from convexprune._runs.folder import BLOCKS, CARD, PAGE, REMOVED, RunFolder, identity
from convexprune._schema.functions import Call
from convexprune._schema.presets import PRESETS
from convexprune._storage.batches import room_on
from convexprune._storage.files import checksums, sha256, write_json, write_text
from convexprune._storage.staging import output_folder
from convexprune.adapters import HuggingFaceModel, Inspection
from convexprune.recipe import Recipe
from convexprune.report import OperatorReport, Report
from convexprune.validation._advice import measured_near
from convexprune.validation._perplexity import streamed_evaluation


class InMemory(Request):
    def run(self) -> PruneResult:
        """Prune the loaded model in place. After a failure the model is unchanged."""
        begin("loading the model")
        undo = isinstance(self.source, PreTrainedModel)
        with self.cast_back(), self.open(device=self.device).lent(undo) as loaded:
            return self._pruned(loaded)

    def _pruned(self, loaded: HuggingFaceModel) -> PruneResult:
        self._check(loaded)
        self.clock.lap("load")
        windows = self._windows(loaded, {})
        report = self._report(loaded, windows)
        self._evaluate(report, "dense", loaded, windows)
        store = MemoryStore(range(len(loaded.layers)))
        with use_threads(self.threads):
            self._allocate(loaded, windows, report, store)
            self._choose(loaded, windows, report, store)
            on_operator = self._on_operator(loaded)

            def record(operator: OperatorReport) -> None:
                report.operators.append(operator)
                on_operator(operator)

            prune_claimed(loaded, store, self._work(windows), record)
        self.clock.lap("prune")
        self._evaluate(report, "pruned", loaded, windows)
        self._warn(report, report.sparser_before)
        self._end(report)
        pruned, removed = loaded.model, dict[str, Any]()
        if self.removal is not None:
            narrowed = self.removal.narrowed(pruned.get_parameter)
            pruned, report.narrowed = narrowed.model(loaded), narrowed.sizes(loaded)
            removed[_record_of_removal(self.recipe)] = narrowed.note()
        mark_sparse(pruned, report)
        model = held(pruned)
        return PruneResult(report=report, tokenizer=loaded.tokenizer, output_dir=None, _model=model, _removed=removed)


logger = logging.getLogger(__name__)


class InFolder(Request):
    def __init__(self, settings: dict[str, Any], call: Call) -> None:
        super().__init__(settings, call)
        assert call.output_dir is not None
        place = output_folder(call.output_dir, self.source)
        self.folder = RunFolder(place, require_only_result if call.overwrite else None)

    def run(self) -> PruneResult:
        self.folder.check(self.call.resume or self.executor.rank is not None)
        if self.folder.is_finished and not self.executor.rank:
            self._check_finished()
        begin("loading the model")
        undo = isinstance(self.source, PreTrainedModel)
        with self.cast_back(), self.open(device=self.device, stream=True).lent(undo) as loaded:
            return self._pruned(loaded)

    def plan(self) -> Inspection:
        """Check everything before a run, and predict work and needs; nothing is written."""
        self.folder.check(self.call.resume or self.executor.rank is not None)
        begin("loading the model")
        with self.open(device=self.device, stream=True).lent() as loaded:
            self._check(loaded)
            begin("reading the weights")
            loaded.origin()
            if not self.sources.has_sampled:
                self._windows(loaded, {})
        found = self._inspection()
        if self.size is not None:
            found = replace(found, notes=(*found.notes, self.size.require(self.target)))
        return replace(found, zeros=0) if self.removal is not None and self.removal.chosen_first else found

    def _inspection(self) -> Inspection:
        settings = {name: value for name, value in self.recipe.chosen.items() if name != "model"}
        if self.removal is not None:  # a refit costs what it does on any support; which layers go is decided later
            whole = {"pattern": "unstructured", "method": "magnitude", "refit": self.recipe.refit is not False}
            alike = whole if self.removal.chosen_first else {"pattern": "columns"}
            settings |= alike | {"targets": self.open.keywords["targets"], "prefix": self.recipe.prefix}
        return adapters.inspect(self.source, trust_remote_code=self.call.trust_remote_code, **settings)

    def _say_forecast(self) -> None:
        """Say what a run for an intention, or for a size, takes, and what is known of its quality."""
        recipe, preset, size = self.recipe, self.recipe.preset, self.size
        if (preset is None and size is None) or self.executor.rank:
            return
        begin(f"{FORECAST}{self._inspection().forecast}")
        zeros_alone = recipe.sparsity != 0 and recipe.quantize is None and recipe.bits is None
        if preset is not None and PRESETS[preset].cost and recipe.pattern == "unstructured" and zeros_alone:
            begin(f"{FORECAST}preset {preset}, measured: {PRESETS[preset].cost}")
        if size is not None:
            begin(f"{FORECAST}{measured_near(8 * self.target / size.weights)}")

    def _pruned(self, loaded: HuggingFaceModel) -> PruneResult:
        folder = self.folder
        self._check(loaded)
        self._say_forecast()
        begin("reading the weights")
        self.origin = loaded.origin()  # weights that are not finite are found here, before any work
        self.clock.lap("load")
        continues = self.call.resume and self.sources.has_sampled and folder.is_unfinished
        windows = self._windows(loaded, folder.sampled() if continues else {})
        report = self._report(loaded, windows)
        report.environment["folder"] = str(folder.folder.absolute())
        report.identity = self._identity(windows, report)
        if self.call.overwrite and not self.call.resume:
            folder.restart()
        elif self.call.overwrite and folder.holds(report) and holds_pack(folder.folder) == self.call.pack:
            folder.replaces = None  # so the run is finished
            self._check_finished()
        with folder.opened(report.identity, self.sources.sampled(windows), self.executor.rank):
            written = not folder.is_finished and self._finish(loaded, windows, report)
        in_place = not loaded.streams and self.removal is None
        if in_place and not written:  # whoever has done the work
            pruned = self._reader()()
            for layer in loaded.layers:
                loaded.load_state(layer, pruned.get_submodule(layer.name).state_dict())
        if in_place:
            mark_sparse(loaded.model, folder.report())
        model = held(loaded.model) if in_place else self._reader()
        return PruneResult(report=folder.report(), tokenizer=loaded.tokenizer, output_dir=folder.folder, _model=model)

    def _identity(self, windows: Windows, report: Report) -> dict[str, Any]:
        """Return everything that decides the bits of the result; a resumed run must have the same."""
        return identity(
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

    def _finish(self, loaded: HuggingFaceModel, windows: Windows, report: Report) -> bool:
        """Prune the unfinished layers and write the result, unless another rank writes. Return True after writing."""
        if not loaded.streams:  # once it is pruned in place, it is too late
            self._evaluate(report, "dense", loaded, windows)
        on_gpu = not is_host(torch.device(self.device))
        needed = adapters.device_bytes(loaded.model, self.recipe, self.call.trust_remote_code) if on_gpu else 0
        store = FolderStore(self.folder.work, len(loaded.layers), self.device, room_on(self.device, needed))
        with use_threads(self.threads):
            self._allocate(loaded, windows, report, store)
            self._choose(loaded, windows, report, store)
        opened = partial(adapters.reopen, partial(self.open, allow_changed=True), self.origin)
        job = Job(self.folder.work, self._work(windows), opened, self.threads, self.installed, needed)
        store.discard_damaged()
        finished = filter(store.is_finished, range(store.count))
        earlier = [report for number in finished for report in store.reports(number)]
        if earlier and self.executor.rank is None:  # ranks begin at different times: what one finds may be of now
            self.clock.laps["solves of earlier calls"] = sum(each.seconds for each in earlier)
        self.executor.run(job, loaded, store, self._on_operator(loaded, earlier))
        self.clock.lap("prune")
        with self.folder.alone() as unfinished:
            if unfinished:
                self._write(loaded, store, windows, report)
        return unfinished

    def _write(self, loaded: HuggingFaceModel, store: FolderStore, windows: Windows, report: Report) -> None:
        begin("checking the finished layers")
        store.require_whole()
        report.operators = [o for number in range(store.count) for o in store.reports(number)]
        self._warn(report, report.sparser_before)
        if not loaded.streams:
            store.restore(loaded)
            self._evaluate(report, "pruned", loaded, windows)
        elif "evaluation" in windows:
            report.perplexity = streamed_evaluation(loaded, windows["evaluation"], store)
            self.clock.lap("evaluation")
        begin("writing the result")
        place = self.folder.staging.begin()
        self._write_files(loaded, store, report, place)
        self.clock.lap("write")
        self._end(report)
        report.documents = {CARD: str(sha256(write_card(report, place)))}
        write_text(place / PAGE, page(report))
        self.folder.finish(report)

    def _write_files(self, loaded: HuggingFaceModel, store: FolderStore, report: Report, place: Path) -> None:
        stored = adapters.pruned_entries(loaded, store)
        narrowed = None if self.removal is None else self.removal.narrowed(lambda name: stored[name].read())
        if narrowed is not None:
            report.narrowed = narrowed.sizes(loaded)
        adapters.save_from_store(loaded, store, place, self.given_tokenizer, partial(with_sparsity, report), narrowed)
        store.write_blocks(place / BLOCKS, [layer.name for layer in loaded.layers])
        write_recipe(self.recipe, place)
        if narrowed is not None:
            write_json(place / _record_of_removal(self.recipe), narrowed.note())
        adapters.require_written(loaded, place, store, narrowed)
        report.files = checksums(place)
        report.bytes = sum((place / name).stat().st_size for name in report.files)
        if self.call.pack:
            pack_in_place(place, report.files, [operator.name for operator in report.operators]).tell(report)

    def _check_finished(self) -> None:
        """Check that a finished result is whole, and warn if it was evaluated on a different text."""
        folder = self.folder.folder
        self.folder.require_whole(plain_checksum)
        if self.call.pack and not holds_pack(folder):
            logger.warning("%s is finished without pack. For one: convexprune pack %s DIR", folder, folder)
        measured = self.folder.report().recipe.get("evaluation")
        if self.recipe.evaluation not in (None, measured):
            logger.warning(
                "%s is finished, and its report is of the text %s: %s is not evaluated. For its perplexity: "
                "convexprune eval %s --text %s",
                folder, measured, self.recipe.evaluation, folder, self.recipe.evaluation,
            )  # fmt: skip

    def _reader(self) -> Callable[[], PreTrainedModel]:
        trusted = self.call.trust_remote_code
        return partial(adapters.load_packed, self.folder.folder, device=self.device, trust_remote_code=trusted)


def _record_of_removal(recipe: Recipe) -> str:
    return REMOVED[recipe.build_pattern().removes or ""]
