"""The context of a decoder layer: inputs, observations of the dense pass, and results for later steps."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import Tensor

from convexprune._layerwise.capture import CachedSubmodule, Calls, ErrorTarget, Observed, Recorded, observe, through
from convexprune._layerwise.model import AbstractModel, AbstractOperator, DecoderLayer, Group, put_back
from convexprune._layerwise.processes import ALONE, ProcessGroup
from convexprune._layerwise.settings import Stream
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune._layerwise.store import AbstractStore
from convexprune.pruners import LayerEdit


@dataclass(eq=False)
class LayerContext:
    """A decoder layer in memory, its inputs, and the results of steps for later steps."""

    model: AbstractModel
    number: int
    layer: DecoderLayer
    calls: Calls  # by hidden states of any shape
    inputs: Mapping[Stream, Sequence[Tensor]]  # batches [batch tokens hidden]; of a process group this rank's share
    states: AbstractStore  # between the layers
    held_out: int = 0  # the number of batches, the last, that judge and never fit
    ranks: ProcessGroup = ALONE
    record: Callable[[], Recorded] = list  # makes a place for tensors, gone after the step unless handed on
    observed: Observed = field(default_factory=lambda: Observed([], {}))  # in the pass of the dense layer
    # statistics of the first stage, if known: with a dense prefix nothing changes them
    first: Mapping[Group, CalibrationStatistics] = field(default_factory=dict)
    is_dense: bool = field(default=True, init=False)  # no step has moved a weight yet
    seen: dict[Group, Recorded] = field(default_factory=dict, init=False)  # inputs x* after the present earlier stages
    # dense weights, if steps move them and later steps compare
    dense: dict[AbstractOperator, Tensor] = field(default_factory=dict, init=False)
    # the last edit by stack, without its weight
    edits: dict[tuple[str, ...], LayerEdit] = field(default_factory=dict, init=False)
    seconds: dict[tuple[str, ...], float] = field(default_factory=dict, init=False)  # by stack, of earlier passes
    # bytes of operators on block grids (`LayerEdit.blocks`)
    blocks: dict[str, Tensor | None] = field(default_factory=dict, init=False)

    def observe(self, error_targets: Collection[ErrorTarget] = ("operator",)) -> Observed:
        self.observed = observe(self.layer, self.calls, self.inputs["dense"], self.record, error_targets)
        return self.observed

    def outputs(self, stream: Stream = "dense", replayed: Mapping[CachedSubmodule, Recorded] | None = None) -> Recorded:
        """Record the outputs [batch tokens hidden] of the layer in its current state, for a stream."""
        return recorded(through(self.layer, self.calls, self.inputs[stream], replayed), self.record())

    @property
    def replayed(self) -> dict[CachedSubmodule, Recorded]:
        """The submodules that later passes can skip, with the inputs for their replay."""
        return {self.observed.cached[group]: x for group, x in self.seen.items() if group in self.observed.cached}

    @property
    def is_last(self) -> bool:
        following = self.number + 1
        return following == len(self.model.layers) or self.states.is_finished(following)

    def hand_on(self, outputs: Recorded, stream: Stream = "dense") -> None:
        """Keep the batches [batch tokens hidden] that enter the next layer, and prefetch that layer."""
        self.states.put_hidden(self.number + 1, stream, outputs)
        for following in self.model.layers[self.number + 1 : self.number + 2]:
            self.model.prefetch(following)

    def keep_dense(self) -> None:
        if self.is_dense:
            self.dense = {operator: operator.read().clone() for operator in self.layer.operators}

    @contextmanager
    def with_dense(self, groups: Iterable[Group]) -> Iterator[None]:
        """Give operators of some groups their dense weights during the context."""
        operators = [operator for group in groups for operator in group.operators if operator in self.dense]
        with put_back(operators):
            for operator in operators:
                operator.write(self.dense[operator])
            yield

    def begin_pass(self, prefix: Stream, edits: bool) -> None:
        """Forget inputs x* of earlier passes, unless they stay: in the first stage, or before any edit."""
        same = chain(*self.layer.stages[: None if self.is_dense and not edits else 1]) if prefix == "dense" else ()
        self.seen = {group: self.observed.inputs[group] for group in same if group in self.observed.inputs}
        self.is_dense = self.is_dense and not edits

    def note_edit(self) -> None:
        """Forget results that hold only for earlier weights: inputs and solutions."""
        self.is_dense = False
        self.seen.clear()
        self.blocks.clear()
        for names, edit in self.edits.items():
            self.edits[names] = replace(edit, solutions=(), other_products=edit.products)


def propagate(context: LayerContext) -> None:
    context.hand_on(context.outputs())


def recorded(batches: Iterable[Tensor], place: Recorded) -> Recorded:
    for batch in batches:
        place.append(batch)
    return place
