"""The loop over decoder layers: a layer is in memory, with its inputs, while a step works."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from convexprune._layerwise.capture import Calls, Recorded
from convexprune._layerwise.context import LayerContext, propagate, recorded
from convexprune._layerwise.model import AbstractModel, Call
from convexprune._layerwise.settings import Stream
from convexprune._layerwise.store import AbstractStore, MemoryStore


class LayerCalls:
    """The calls of decoder layers of a `model`, for batches of each shape among `windows` of token ids, and samples."""

    def __init__(self, model: AbstractModel, windows: Sequence[Tensor]) -> None:
        batches = {each.shape: each for batch in windows for each in (batch[:1], batch)}
        self._by_shape = {shape: model.calls(batch) for shape, batch in batches.items()}

    def of(self, number: int) -> Calls:

        def call(hidden: Tensor) -> Call:
            return self._by_shape[hidden.shape[:2]][number]

        return call


LayerStep = Callable[[LayerContext], None]


class LayerWalk:
    """Hand decoder layers to a step, in turn, with weights in memory and inputs.

    The model turns `windows` of token ids [batch tokens] into inputs of the first layer. `states` choose the next
    layer, and keep hidden states of the requested `streams` between layers. `on_layer` takes the name of a finished
    layer.
    """

    def __init__(
        self,
        model: AbstractModel,
        windows: Sequence[Tensor],
        states: AbstractStore,
        streams: Sequence[Stream] = ("dense",),
        on_layer: Callable[[str], None] = lambda _: None,
        calls: LayerCalls | None = None,
    ) -> None:
        self._model, self._windows, self._states, self._streams = model, windows, states, streams
        self._on_layer, self._calls = on_layer, calls or LayerCalls(model, windows)

    def run(self, step: LayerStep) -> None:
        finished = False
        while not finished:
            with self._states.claim() as number:
                finished = number is None
                if number is not None:
                    self.visit(number, step)

    @torch.no_grad()
    def visit(self, number: int, step: LayerStep) -> None:
        """Call the step with a layer, unless its inputs are damaged and a lower layer is to restore them."""
        inputs = dict[Stream, Sequence[Tensor]]()
        for stream in self._streams:
            if (found := self._inputs(number, stream)) is None:
                return
            inputs[stream] = found
        layer = self._model.layers[number]
        with self._model.resident(layer), self._states.scratch(number) as record:
            calls = self._calls.of(number)
            step(LayerContext(self._model, number, layer, calls, inputs, self._states, record=record))
        self._on_layer(layer.name)

    def _inputs(self, number: int, stream: Stream) -> Recorded | None:
        found = self._states.hidden(number, stream)
        if found is None and all(self._states.is_finished(n) for n in range(number)):
            return self._recomputed_inputs(number, stream)
        return found

    def _recomputed_inputs(self, number: int, stream: Stream) -> Recorded:
        """Recompute inputs from the nearest known layer, through dense or finished layers."""
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
