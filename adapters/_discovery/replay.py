"""Check that a model equals its layers, called singly, and that no token sees later tokens."""

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convexprune._layerwise.context import propagate
from convexprune._layerwise.model import Call
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerCalls, LayerWalk
from convexprune.errors import ModelError

from .kinds import ProbedModel

TOLERANCE = 1e-3
"""Relative; replays are bit for bit the same where the kernels are, so this only has to tell noise from nonsense."""


def refuse_other_replays(model: ProbedModel) -> None:
    """Refuse a model that differs from its decoder layers. For a streamed model only the calls are compared."""
    batch = model.probe_tokens()
    _refuse_other_shapes(batch, model.first_inputs(batch))
    if model.streams:
        error = 0.0 if _same(model.calls(batch), model.calls(batch.flip(-1))) else inf
    else:
        error = replay_error(model, batch)
    if not error <= TOLERANCE:
        raise ModelError(
            f"{model.name}: its decoder layers, called one by one, do not give what the model gives (relative "
            f"error {error:.1e}). Something happens between them, or what they are called with depends on the "
            "tokens; such a model cannot be pruned layer by layer."
        )


def _refuse_other_shapes(batch: Tensor, hidden: Tensor) -> None:
    """Refuse hidden states that are not a single vector per token; Gemma 3n has four."""
    if hidden.shape[:-1] != batch.shape:
        raise ModelError(
            f"The decoder layers are called with hidden states {list(hidden.shape)} for {list(batch.shape)} tokens; "
            "accepted: [batch tokens hidden]. Such a model cannot be pruned layer by layer."
        )


@torch.no_grad()
def refuse_looking_ahead(model: ProbedModel) -> None:
    """Refuse a model whose first layer changes a token's output with the last token, as an encoder does."""
    batch, layer = model.probe_tokens(), model.layers[0]
    other = torch.cat([batch[:, :-1], batch[:, :1]], dim=1)
    call = model.calls(batch)[0]
    with model.resident(layer):
        before, after = (call(layer.module, model.first_inputs(tokens))[:, :-1].float() for tokens in (batch, other))
    noise = max(TOLERANCE, 8 * torch.finfo(model.model.dtype).eps)  # experts multiply in other batches
    if (after - before).norm() > noise * before.norm():
        raise ModelError(
            f"{model.name} is an encoder: what {layer.name} gives for a token depends on those behind it. convexprune "
            "prunes models that only decode."
        )


@torch.no_grad()
def replay_error(model: ProbedModel, batch: Tensor) -> float:
    """Return the relative difference between the model and its decoder layers, called in turn, as by another batch.

    The error is zero if nothing happens between the layers, and calls depend on the shape of a batch only.
    """
    own: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        own.append(output if isinstance(output, Tensor) else output[0])

    with model.layers[-1].module.register_forward_hook(keep):
        model.forward(batch)
    count = len(model.layers)
    states, calls = MemoryStore(range(count)), LayerCalls(model, [batch.flip(-1)])
    LayerWalk(model, [batch], states, calls=calls).run(propagate)
    hidden = states.take(count)[0]
    return float((hidden - own[0]).float().norm() / own[0].float().norm().clamp_min(1e-30))


def _same(first: Sequence[Call], second: Sequence[Call]) -> bool:
    pairs = zip(tree_leaves([vars(c) for c in first]), tree_leaves([vars(c) for c in second]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
