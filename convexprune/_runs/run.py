"""Prune a model on tokens, in memory or in a folder."""

from collections.abc import Iterable

from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.model import AbstractModel, DecoderLayer
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.work import Work, prune_claimed
from convexprune._runs.executors import AbstractExecutor
from convexprune._runs.worker import Job
from convexprune.errors import PatternError
from convexprune.report import OnOperator


def check_patterns(layers: Iterable[DecoderLayer], settings: LayerSettings) -> None:
    """Refuse, before any work, a pattern that some operator does not fit."""
    for layer in layers:
        for operator in layer.operators:
            try:
                settings.pattern_of(f"{layer.name}.{operator.name}").check(*operator.shape)
            except PatternError as error:
                raise PatternError(f"{layer.name}.{operator.name}: {error}") from error


def prune_in_place(model: AbstractModel, work: Work, on_operator: OnOperator) -> None:
    prune_claimed(model, MemoryStore(range(len(model.layers))), work, on_operator)


def prune_in_folder(
    executor: AbstractExecutor, job: Job, model: AbstractModel, store: FolderStore, on_operator: OnOperator
) -> None:
    """Prune every decoder layer that is missing in a store."""
    store.discard_damaged()
    for number in range(store.count):
        if store.is_finished(number):
            for report in store.reports(number):
                on_operator(report)
    executor.run(job, model, store, on_operator)
