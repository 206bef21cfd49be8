"""Logits of few positions at a time: those of a whole window can take more memory than the rest of a run."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convexprune._device.precision import widened
from convexprune._layerwise.model import computing

POSITIONS = 128  # of each window, at most
NUMBERS = 1 << 23  # in a piece, at most: 32 MiB in float32


def pieces(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    """Return the positions of ids [windows window] that predict a token, all but the last, in pieces if some can be
    skipped.
    """
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
