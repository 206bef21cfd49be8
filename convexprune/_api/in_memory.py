"""A call of `prune` without an output folder: the model is whole in memory, and pruned in place."""

from transformers import PreTrainedModel

from convexprune._api.request import Request
from convexprune._api.result import PruneResult
from convexprune._device.machine import threads as use_threads
from convexprune._progress import begin
from convexprune._rendering.card import mark_sparse
from convexprune._runs.executors import prune_in_place
from convexprune.adapters import HuggingFaceModel
from convexprune.report import OperatorReport


class InMemory(Request):
    def run(self) -> PruneResult:
        """Prune the loaded model in place. After a failure the model is unchanged."""
        begin("loading the model")
        with self.open(device=self.device).lent(undo=isinstance(self.source, PreTrainedModel)) as loaded:
            return self._pruned(loaded)

    def _pruned(self, loaded: HuggingFaceModel) -> PruneResult:
        self._check(loaded)
        self.clock.lap("load")
        windows = self._windows(loaded, {})
        report = self._report(loaded, windows)
        self._evaluate(report, "dense", loaded, windows)
        with use_threads(self.threads):
            self._allocate(loaded, windows, report)
            self._choose(loaded, windows, report)
            on_operator = self._on_operator(loaded)

            def record(operator: OperatorReport) -> None:
                report.operators.append(operator)
                on_operator(operator)

            prune_in_place(loaded, self._work(windows), record)
        self.clock.lap("prune")
        self._evaluate(report, "pruned", loaded, windows)
        self._warn(report, report.sparser_before)
        self._end(report)
        pruned = loaded.model
        if (narrowed := self._narrowed(pruned.get_parameter)) is not None:
            pruned, report.narrowed = narrowed.model(loaded), narrowed.sizes(loaded)
        mark_sparse(pruned, report)
        return PruneResult(report=report, tokenizer=loaded.tokenizer, output_dir=None, _model=lambda: pruned)
