"""Decoder layers inside a forward pass of their model, and logits of few positions at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convexprune._device.precision import widened
from convexprune._layerwise.model import Call, DecoderLayer, computing
from convexprune.errors import ModelError


class _Reached(Exception):
    """Ends a forward pass at the first decoder layer."""


def entering(layer: DecoderLayer, forward: Callable[[], object]) -> Tensor:
    """Return the hidden states [batch tokens hidden] that enter a layer."""
    reached: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(_split(args, kwargs)[0])
        raise _Reached

    with layer.module.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Reached):
        forward()
    return reached[0]


class CallRecorder:
    """Record the calls of a model's decoder layers, of which the first is in memory.

    Only the first layer computes; later layers pass their input on, in the form of the first layer's output, so that
    their weights are not needed.
    """

    def __init__(self, model: str, layers: Sequence[DecoderLayer]) -> None:
        self._model, self._layers = model, layers
        self._calls: list[Call] = []
        self._handed: Tensor | None = None
        self._beside: tuple[Any, ...] | None = None  # what a layer returns beside the hidden states, if it is a tuple

    def record(self, forward: Callable[[], object]) -> list[Call]:
        first = self._layers[0].module.register_forward_hook(self._watch, with_kwargs=True)
        with first, standing_in(self._layers[1:], self._hand_on):
            forward()
        if len(self._calls) != len(self._layers):
            raise ModelError(
                f"{self._model}: a forward pass calls {len(self._calls)} decoder layers, and there are "
                f"{len(self._layers)}. Each has to be called once; such a model cannot be pruned layer by layer."
            )
        return self._calls

    def returned(self, hidden: Tensor) -> Any:
        """Return a layer's output with the hidden states `hidden`."""
        return hidden if self._beside is None else (hidden, *self._beside)

    def _watch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._calls.append(_split(args, kwargs)[1])
        self._beside = None if isinstance(output, Tensor) else tuple(output[1:])
        self._handed = output if isinstance(output, Tensor) else output[0]

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = _split(args, kwargs)
        self._calls.append(call)
        if self._handed is None or not torch.equal(hidden, self._handed):
            raise ModelError(
                f"{self._model}: something happens between its decoder layers, so that they are not the model when "
                "they are called one by one; such a model cannot be pruned layer by layer."
            )
        return self.returned(hidden)


@contextmanager
def standing_in(layers: Sequence[DecoderLayer], forward: Callable[..., Any]) -> Iterator[None]:
    """Let layers compute something else during the context."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(computing(layer.module, forward))
        yield


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """Split the hidden states from all further arguments of a decoder layer."""
    if args:
        return args[0], Call(args[1:], dict(kwargs))
    return kwargs["hidden_states"], Call((), {name: kwargs[name] for name in kwargs if name != "hidden_states"})


POSITIONS = 128  # of each window, at most
NUMBERS = 1 << 23  # in a piece, at most: 32 MiB in float32


def pieces(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    """Return the positions of ids [windows window] that predict a token, all but the last, in pieces if possible."""
    every = torch.arange(ids.shape[1] - 1)  # on the CPU: wherever accelerate has put the head, it can be indexed so
    if not _leaves_out(model):
        return (every,)
    vocabulary = model.config.get_text_config().vocab_size
    return every.split(max(1, min(POSITIONS, NUMBERS // (vocabulary * len(ids)))))


def logits_at(model: PreTrainedModel, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the logits [windows positions vocabulary] of ids [windows window] at some positions, or all."""
    asked: dict[str, Any] = {} if positions is None or not _leaves_out(model) else {"logits_to_keep": positions}
    with widened(ids.device, model.dtype):
        logits = model(input_ids=ids, use_cache=False, **asked).logits
    return logits if positions is None or asked else logits[:, positions]


def logits_in_pieces(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """Yield the logits of ids [windows window] by piece of `pieces`, while the model's decoder runs only once.

    The decoder's output is replayed for later pieces. If the output does not cover all positions, the model runs
    again.
    """
    first, *others = pieces(model, ids)
    named = (model.get_decoder(), model.base_model, *model.children())  # some families name none, or the whole model
    decoder, outputs = next(m for m in named if isinstance(m, nn.Module) and m is not model), list[Any]()
    with decoder.register_forward_hook(lambda _, __, output: outputs.append(output)):
        logits = logits_at(model, ids, first)
    yield logits
    if others and (len(outputs) != 1 or outputs[0][0].shape[:2] != ids.shape):
        yield logits_at(model, ids, torch.cat(others))
        return
    for positions in others:
        with computing(decoder, lambda *_, **__: outputs[0]):
            logits = logits_at(model, ids, positions)
        yield logits


def _leaves_out(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in signature(model.forward).parameters
