"""The context of a decoder layer: inputs, observations of the dense pass, and results for later steps."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import Tensor

from convexprune._device.transfer import sending
from convexprune._layerwise.capture import Calls, ErrorTarget, Observed, Recorded, observe, put_away, through
from convexprune._layerwise.model import AbstractModel, AbstractOperator, DecoderLayer, Group
from convexprune._layerwise.processes import ALONE, ProcessGroup
from convexprune._layerwise.replay import CachedSubmodule
from convexprune._layerwise.settings import Stream
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune._layerwise.store import AbstractStates
from convexprune._storage.batches import Batches
from convexprune.pruners import LayerEdit


@dataclass(eq=False)
class LayerContext:
    """One decoder layer, whose weights are in memory, as the walk hands it to a step, and what steps find out.

    Args:
        model: the model.
        number: of the layer.
        layer: the layer.
        calls: how the model calls it, for hidden states of each shape.
        inputs: the batches [batch tokens hidden] that enter it, of each stream; of a process group this rank's share.
        states: keep what is between the layers.
        held_out: how many batches, the last ones, judge and never fit.
        ranks: the processes that work on the layer together.
        record: makes a place to keep tensors in, which is gone after the step unless it is handed on.
        observed: what a pass of the dense layer has shown.
        first: the statistics of the first stage, if they are known: with a dense prefix nothing changes them.
        is_dense: whether no step has moved a weight yet.
        seen: inputs x* of groups, as the stages before them are by now.
        dense: the dense weights of operators, if steps move them and later ones compare with them.
        edits: the last edit of each stack, by the names of its operators, without its weight.
        seconds: spent on each stack by earlier passes.
        blocks: of operators, by name, the bytes of what a step has put on block grids (`LayerEdit.blocks`).
    """

    model: AbstractModel
    number: int
    layer: DecoderLayer
    calls: Calls
    inputs: Mapping[Stream, Sequence[Tensor]]
    states: AbstractStates
    held_out: int = 0
    ranks: ProcessGroup = ALONE
    record: Callable[[], Recorded] = list
    observed: Observed = field(default_factory=lambda: Observed([], {}))
    first: Mapping[Group, CalibrationStatistics] = field(default_factory=dict)
    is_dense: bool = field(default=True, init=False)
    seen: dict[Group, Recorded] = field(default_factory=dict, init=False)
    dense: dict[AbstractOperator, Tensor] = field(default_factory=dict, init=False)
    edits: dict[tuple[str, ...], LayerEdit] = field(default_factory=dict, init=False)
    seconds: dict[tuple[str, ...], float] = field(default_factory=dict, init=False)
    blocks: dict[str, Tensor | None] = field(default_factory=dict, init=False)

    def observe(self, error_targets: Collection[ErrorTarget] = ("operator",)) -> Observed:
        """Run the dense layer once and keep the observations (see `capture.observe`)."""
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
        """True if no layer waits for this layer's outputs."""
        following = self.number + 1
        return following == len(self.model.layers) or self.states.is_finished(following)

    def hand_on(self, outputs: Recorded, stream: Stream = "dense") -> None:
        """Keep the batches [batch tokens hidden] that enter the next layer, and prefetch that layer."""
        self.states.put_hidden(self.number + 1, stream, outputs)
        for following in self.model.layers[self.number + 1 : self.number + 2]:
            self.model.prefetch(following)

    def keep_dense(self) -> None:
        """Copy the weights of all operators, unless a step has moved them."""
        if self.is_dense:
            self.dense = {operator: operator.read().clone() for operator in self.layer.operators}

    @contextmanager
    def with_dense(self, groups: Iterable[Group]) -> Iterator[None]:
        """Give operators of some groups their dense weights during the context."""
        operators = [operator for group in groups for operator in group.operators if operator in self.dense]
        edited = {operator: operator.read().clone() for operator in operators}
        for operator in edited:
            operator.write(self.dense[operator])
        try:
            yield
        finally:
            for operator, weight in edited.items():
                operator.write(weight)

    def begin_pass(self, prefix: Stream, edits: bool) -> None:
        """Forget inputs x* of earlier passes.

        With a dense prefix the inputs of the dense pass are known: of the first stage, and before any edit of all
        stages.
        """
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
    """Hand on the outputs of the `context`'s layer in its current state."""
    context.hand_on(context.outputs())


@sending()
def recorded(batches: Iterable[Tensor], place: Recorded) -> Recorded:
    """Keep batches in a place, and return the place."""
    for batch in batches:
        if isinstance(place, Batches):
            put_away(batch, place)
        else:
            place.append(batch)
    return place
