"""The task that every run is made of: prune one decoder layer, from files to files, and again if need be."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune.errors import OutputError
from convexprune.model import AbstractModel, Call
from convexprune.pipeline.layer import prune_observed
from convexprune.pipeline.passes import Calls, Recorded, observe, through
from convexprune.pipeline.settings import HiddenStates, LayerSettings, Tell
from convexprune.pipeline.store import AbstractStore, FolderStore, Stream
from convexprune.pipeline.team import ALONE, ProcessGroup, SamePruned
from convexprune.pipeline.tensors import Batches
from convexprune.report import OperatorReport


@dataclass(frozen=True, eq=False)
class Work:
    """What all layers of a run are pruned on: windows [samples length] to fit and to judge by, how, and by whom."""

    tokens: Tensor
    held_out: Tensor
    batch_size: int
    settings: LayerSettings
    process_group: ProcessGroup = ALONE

    def of_rank(self, ranks: ProcessGroup) -> "Work":
        """The part of one rank: a share of the batches, and all solves. The first rank computes the bounds, too."""

        def local(windows: Tensor) -> Tensor:
            batches = windows.split(self.batch_size)
            return torch.cat([windows[:0], *batches[ranks.local_slice(len(batches))]])

        pruner, bound_rows = SamePruned(self.settings.pruner, ranks.broadcast), self.settings.bound_rows
        settings = replace(self.settings, pruner=pruner, bound_rows=0 if ranks.rank else bound_rows)
        return Work(local(self.tokens), local(self.held_out), self.batch_size, settings, ranks)

    @property
    def judges(self) -> list[Tensor]:
        """The batches that are never fitted, the last ones."""
        return list(self.held_out.split(self.batch_size)) if len(self.held_out) else []

    @property
    def batches(self) -> list[Tensor]:
        """All of them [batch length]."""
        return [*self.tokens.split(self.batch_size), *self.judges]


class RecordedCalls:
    """How the layers are called for batches of every size that there is."""

    def __init__(self, model: AbstractModel, batches: Sequence[Tensor]) -> None:
        self._by_size = {len(batch): model.calls(batch) for batch in {len(b): b for b in batches}.values()}

    def of(self, number: int) -> Calls:
        """Those of one layer."""

        def call(batch: Tensor) -> Call:
            return self._by_size[len(batch)][number]

        return call


def prune_claimed(model: AbstractModel, store: AbstractStore, work: Work, tell: Tell) -> None:
    """Prune one layer after another as the store hands them out, until all are finished, by whomever.

    Layers are fed by the dense network, so the next one can be claimed by another worker as soon as this one has
    looked at what its dense layer makes of the tokens: before it is pruned.
    """
    calls = RecordedCalls(model, work.batches)
    while True:
        with store.claim() as number:
            if number is None:
                return
            prune_layer_task(model, calls, store, work, number, tell)


@torch.no_grad()
def prune_layer_task(
    model: AbstractModel, calls: RecordedCalls, store: AbstractStore, work: Work, number: int, tell: Tell
) -> None:
    """Prune layer `number` on what enters it, and put it and what enters the next one away.

    All that it reads is in the model and the store, and all that it leaves is in the store: done again, it leaves the
    same. If what enters the layer is damaged and a lower layer is still to come, nothing is done: that one brings it.

    Raises:
        ModelError, PruningError: see `prune_observed`.
        OutputError: the disk is full or fails.
    """
    layer, settings, reports = model.layers[number], work.settings, list[OperatorReport]()
    hidden = _entering(model, calls, store, work, number)
    if hidden is None:
        return

    def report(operator: OperatorReport) -> None:
        reports.append(operator)
        tell(operator)

    more = number + 1 < len(model.layers) and not store.is_finished(number + 1)
    with model.resident(layer), store.scratch(number) as record:
        observed = observe(layer, calls.of(number), hidden.dense, record, (settings.correct,))
        if more:
            store.put_hidden(number + 1, "dense", observed.outputs)
            model.prefetch(model.layers[number + 1])
        model.keep(layer)
        known = prune_observed(layer, calls.of(number), hidden, observed, settings, report, record=record)
        if more and settings.prefix == "pruned":
            fed = _recorded(through(layer, calls.of(number), hidden.fed, known), record())
            store.put_hidden(number + 1, "fed", fed)
        store.finish(number, model.state(layer), reports)


@torch.no_grad()
def carried(
    model: AbstractModel,
    calls: RecordedCalls,
    batches: Sequence[Tensor],
    numbers: Sequence[int],
    record: Callable[[], Recorded],
    pruned: AbstractStore | None = None,
) -> Sequence[Tensor]:
    """The batches some layers further on, where these are dense, or as a store has `pruned` them."""
    last = None
    for number in numbers:
        layer = model.layers[number]
        with model.resident(layer):
            if pruned is not None:
                model.load_state(layer, pruned.layer(number))
            batches = _recorded(through(layer, calls.of(number), batches), record())
        if isinstance(last, Batches):
            last.path.unlink()
        last = batches
    return batches


def _entering(
    model: AbstractModel, calls: RecordedCalls, store: AbstractStore, work: Work, number: int
) -> HiddenStates | None:
    """What enters a layer: as the layer before put it away, or else computed again from the nearest that is there."""
    streams: tuple[Stream, ...] = ("dense",) if work.settings.prefix == "dense" else ("dense", "fed")
    found = {}
    for stream in streams:
        found[stream] = store.hidden(number, stream)
        if found[stream] is None:
            if not all(store.is_finished(n) for n in range(number)):
                return None
            found[stream] = _again(model, calls, store, work, number, stream)
    return HiddenStates(found["dense"], found[streams[-1]], len(work.judges), work.process_group)


def _again(
    model: AbstractModel, calls: RecordedCalls, store: AbstractStore, work: Work, number: int, stream: Stream
) -> Sequence[Tensor]:
    start, batches = number - 1, None
    while start > 0 and (batches := store.hidden(start, stream)) is None:
        start -= 1
    if isinstance(store, FolderStore) and not model.streams and store.pruned_here.intersection(range(start, number)):
        raise OutputError(
            f"{store.folder}: what enters layer {number} is damaged, and the model in memory is no longer dense. "
            "Load it again and go on with resume=True (--resume)."
        )
    with store.scratch(number) as record:
        if batches is None:
            start, batches = 0, _recorded(map(model.first_inputs, work.batches), record())
        batches = carried(model, calls, batches, range(start, number), record, store if stream == "fed" else None)
        assert isinstance(batches, list | Batches)
        store.put_hidden(number, stream, batches)
    return batches


def _recorded(batches: Iterable[Tensor], place: Recorded) -> Recorded:
    for batch in batches:
        place.append(batch)
    return place
