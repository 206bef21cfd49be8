"""The one loop over decoder layers: each in turn is in memory, with what enters it, while a step works on it."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._device.transfer import sending
from convexprune._layerwise.capture import Calls, ErrorTarget, Observed, Recorded, observe, put_away, through
from convexprune._layerwise.model import AbstractModel, Call, DecoderLayer
from convexprune._layerwise.replay import CachedSubmodule
from convexprune._layerwise.settings import Stream
from convexprune._layerwise.store import AbstractStates, MemoryStore
from convexprune._storage.batches import Batches


class LayerCalls:
    """How each decoder layer of a `model` is called, for batches of every shape among `windows` of token ids."""

    def __init__(self, model: AbstractModel, windows: Sequence[Tensor]) -> None:
        batches = {batch.shape: batch for batch in windows}
        self._by_shape = {shape: model.calls(batch) for shape, batch in batches.items()}

    def of(self, number: int) -> Calls:
        """How layer `number` is called with hidden states [batch tokens hidden]."""

        def call(hidden: Tensor) -> Call:
            return self._by_shape[hidden.shape[:2]][number]

        return call


@dataclass(frozen=True, eq=False)
class LayerContext:
    """One decoder layer, whose weights are in memory, as the walk hands it to a step.

    Args:
        number: the layer is the one of this number.
        calls: how it is called, for hidden states of each shape.
        inputs: the batches [batch tokens hidden] that enter it, of each stream.
        record: makes a place to keep tensors in, which is gone after the step unless it is handed on.
        states: where what is between the layers is kept.
    """

    model: AbstractModel
    number: int
    calls: Calls
    inputs: Mapping[Stream, Sequence[Tensor]]
    record: Callable[[], Recorded]
    states: AbstractStates

    @property
    def layer(self) -> DecoderLayer:
        """The layer itself."""
        return self.model.layers[self.number]

    def observe(self, error_targets: Collection[ErrorTarget] = ("operator",)) -> Observed:
        """One pass of the dense layer."""
        return observe(self.layer, self.calls, self.inputs["dense"], self.record, error_targets)

    def outputs(self, stream: Stream = "dense", replayed: Mapping[CachedSubmodule, Recorded] | None = None) -> Recorded:
        """What the layer, as it is by now, makes of what enters it.

        Args:
            replayed: submodules that need not run again, and the inputs that they are replayed with.

        Returns:
            The batches [batch tokens hidden] that leave it.
        """
        return recorded(through(self.layer, self.calls, self.inputs[stream], replayed), self.record())

    def hand_on(self, outputs: Recorded, stream: Stream = "dense") -> None:
        """Keep what enters the next layer, which may come nearer now.

        Args:
            outputs: the batches [batch tokens hidden].
        """
        self.states.put_hidden(self.number + 1, stream, outputs)
        for following in self.model.layers[self.number + 1 : self.number + 2]:
            self.model.prefetch(following)


LayerStep = Callable[[LayerContext], None]


class LayerWalk:
    """Hands decoder layers to a step, one after another, each in memory and with what enters it.

    Args:
        windows: token ids [batch tokens]; the first layer gets what the model makes of them.
        states: say which layer is next, and keep what is between the layers.
        streams: the networks of which a step is given what enters its layer.
        on_layer: called with the name of each layer that is done.
        calls: how the layers are called, if that is known.
    """

    def __init__(
        self,
        model: AbstractModel,
        windows: Sequence[Tensor],
        states: AbstractStates,
        streams: Sequence[Stream] = ("dense",),
        on_layer: Callable[[str], None] = lambda _: None,
        calls: LayerCalls | None = None,
    ) -> None:
        self._model, self._windows, self._states, self._streams = model, windows, states, streams
        self._on_layer, self._calls = on_layer, calls or LayerCalls(model, windows)

    def run(self, step: LayerStep) -> None:
        """Call the step with every layer, until the states have none left."""
        finished = False
        while not finished:
            with self._states.claim() as number:
                finished = number is None
                if number is not None:
                    self.visit(number, step)

    @torch.no_grad()
    def visit(self, number: int, step: LayerStep) -> None:
        """Call the step with one layer.

        If what enters it is damaged and a lower layer is still to come, nothing is done: that one brings it.
        """
        inputs = dict[Stream, Sequence[Tensor]]()
        for stream in self._streams:
            if (found := self._inputs(number, stream)) is None:
                return
            inputs[stream] = found
        layer = self._model.layers[number]
        with self._model.resident(layer), self._states.scratch(number) as record:
            step(LayerContext(self._model, number, self._calls.of(number), inputs, record, self._states))
        self._on_layer(layer.name)

    def _inputs(self, number: int, stream: Stream) -> Recorded | None:
        """What enters a layer: as the layer before it handed it on, or else computed again."""
        found = self._states.hidden(number, stream)
        if found is None and all(self._states.is_finished(n) for n in range(number)):
            return self._recomputed_inputs(number, stream)
        return found

    def _recomputed_inputs(self, number: int, stream: Stream) -> Recorded:
        """From the nearest that is there, through layers that are dense, or as they are finished."""
        start, found = number - 1, None
        while start > 0 and (found := self._states.hidden(start, stream)) is None:
            start -= 1
        start = max(start, 0)

        def propagate_finished(context: LayerContext) -> None:
            self._states.load(context.model, context.number, stream)
            propagate(context)

        with self._states.scratch(number) as record:
            between = MemoryStore(range(start, number), record)
            if found is None:
                found = recorded(map(self._model.first_inputs, self._windows), record())
            between.put_hidden(start, "dense", found)
            LayerWalk(self._model, self._windows, between, calls=self._calls).run(propagate_finished)
            batches = between.take(number)
            self._states.put_hidden(number, stream, batches)
        return batches


def propagate(context: LayerContext) -> None:
    """The step that hands on what the layer of the `context` makes of what enters it."""
    context.hand_on(context.outputs())


@sending()
def recorded(batches: Iterable[Tensor], place: Recorded) -> Recorded:
    """Keep batches."""
    for batch in batches:
        if isinstance(place, Batches):
            put_away(batch, place)
        else:
            place.append(batch)
    return place
