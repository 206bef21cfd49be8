"""From the hidden states that leave the last decoder layer to logits, by the model's own forward pass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .huggingface import HuggingFaceModel


class Head:
    """What a model does after its last decoder layer: final norm, projection, head, whatever its family has there.

    The model's own forward runs with decoder layers that hand through what they are given, so that nothing of the
    family has to be known. Whether a layer returns a tensor or a tuple is seen on one token.
    """

    def __init__(self, model: HuggingFaceModel) -> None:
        self._model = model
        self._tails: list[tuple[Any, ...] | None] = []
        hooks = [layer.module.register_forward_hook(self._look) for layer in model.layers]
        try:
            self._logits(torch.zeros(1, 1, dtype=torch.int64))
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits [batch tokens vocabulary] of `hidden` [batch tokens hidden], the last layer's output for `tokens`."""
        hidden = hidden.to(self._model.model.device)
        with ExitStack() as stack:
            for layer, tail in zip(self._model.layers, self._tails, strict=True):
                stack.enter_context(_returning(layer.module, hidden if tail is None else (hidden, *tail)))
            return self._logits(tokens)

    def _look(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._tails.append(None if isinstance(output, Tensor) else tuple(output[1:]))

    @torch.no_grad()
    def _logits(self, tokens: Tensor) -> Tensor:
        inner = self._model.model
        return inner(input_ids=tokens.to(inner.device), use_cache=False).logits


@contextmanager
def _returning(module: nn.Module, value: Any) -> Iterator[None]:
    """Inside the block, calling the module gives `value` whatever it is given."""
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: value
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
