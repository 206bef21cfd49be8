"""Perplexity on fixed windows of text, as in the pruning literature."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.context import LayerContext, propagate
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._data.likelihood import likelihoods
from convexprune.adapters._discovery.passes import logits_in_pieces
from convexprune.errors import CalibrationError


@dataclass(frozen=True)
class Perplexity:
    """The fit of a model to a text, with all conditions of the number.

    A broken model has the value infinity or NaN.

    Args:
        value: exp(nll).
        nll: mean negative log-likelihood of the predicted tokens, in nats: tokens after the first of a window,
            predicted from earlier tokens of the window.
        tokens: number of predicted tokens.
        windows: number of windows.
        window: tokens of a window.
        stride: tokens between the beginnings of two windows.
    """

    value: float
    nll: float
    tokens: int
    windows: int
    window: int
    stride: int


def perplexity(model: PreTrainedModel, tokens: Tensor, batch_size: int = 1) -> Perplexity:
    """The perplexity of a causal language model on disjoint windows of text.

    The model is evaluated without dropout and left in the mode that it was in. Logits of a few positions at a time are
    in memory, if the model can leave others out.

    Args:
        model: of transformers.
        tokens: token ids [windows window].
        batch_size: windows at once.

    Returns:
        The perplexity.

    Raises:
        CalibrationError: there is no window, or none with a token to predict; or the batch size is not positive.
    """
    training = model.training
    model.eval()
    try:
        return perplexity_of(lambda ids: logits_in_pieces(model, ids.to(model.device)), tokens, batch_size)
    finally:
        model.train(training)


@torch.no_grad()
def perplexity_of(logits: Callable[[Tensor], Iterable[Tensor]], tokens: Tensor, batch_size: int = 1) -> Perplexity:
    """Compute the perplexity of ids [windows window] by pieces of logits [batch positions vocabulary].

    Logits are widened to float32 by window, and losses are summed in float64; batches come once, in order.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"Perplexity needs windows of 2 or more tokens [windows window]; got {list(tokens.shape)}."
        )
    if batch_size < 1:
        raise CalibrationError(f"batch_size={batch_size}: at least 1 is needed.")
    windows, window = tokens.shape
    batches = tokens.split(batch_size)
    step, total = begin("perplexity", len(batches)), 0.0
    for batch in batches:
        total += _batch_nll(logits(batch), batch)
        step("")
    count = windows * (window - 1)
    nll = torch.as_tensor(total, dtype=torch.float64) / count
    # torch's exponential, because Python's raises where the answer is infinity.
    return Perplexity(nll.exp().item(), nll.item(), tokens=count, windows=windows, window=window, stride=window)


@torch.no_grad()
def streamed_evaluation(model: HuggingFaceModel, tokens: Tensor, store: FolderStore) -> dict[str, dict[str, float]]:
    """Compute the perplexity of a model before and after pruning, with a single decoder layer in memory at a time.

    Args:
        model: the model.
        tokens: token ids [windows window].
        store: has the pruned layers, and place for hidden states.

    Returns:
        The fields of `Perplexity` for "dense" and "pruned"; for "pruned" also "kl" (`mean_kl`).
    """
    with store.scratch(store.count) as record:
        states = {
            name: _last_states(model, tokens, record, store.count, pruned)
            for name, pruned in (("dense", None), ("pruned", store))
        }
        found: dict[str, dict[str, float]] = {
            name: dict(vars(_of_states(model, tokens, each))) for name, each in states.items()
        }
        found["pruned"]["kl"] = mean_kl(model, tokens, states["dense"], states["pruned"])
    return found


@contextmanager
def final_states(model: HuggingFaceModel, windows: int) -> Iterator[list[Tensor]]:
    """Record the hidden states after the last decoder layer of a model in memory.

    Args:
        model: the model.
        windows: number of windows that will pass; some families pass a window twice.

    Yields:
        A list; at the end with the states [1 window hidden] of every window, on the CPU.
    """
    states = list[Tensor]()

    def record(_: nn.Module, __: object, output: Any) -> None:
        states.append((output if isinstance(output, Tensor) else output[0]).detach().cpu())

    with model.layers[-1].module.register_forward_hook(record):
        yield states
    states[:] = states[:: len(states) // windows]


def mean_kl(model: HuggingFaceModel, tokens: Tensor, dense: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the divergence from the dense model's predictions, by final hidden states.

    Args:
        model: makes logits of hidden states.
        tokens: token ids [windows window].
        dense: final hidden states [1 window hidden] of the dense model, by window.
        other: final hidden states of the model to judge.

    Returns:
        The mean over the predicted tokens of KL(dense || other), in nats.
    """
    return fmean(likelihoods(model, tokens.split(1), dense, {"other": other})["other"].kl)


def _last_states(
    model: HuggingFaceModel, tokens: Tensor, record: Callable[[], Recorded], count: int, pruned: FolderStore | None
) -> Recorded:
    """Return the hidden states after the last of `count` layers, the pruned layers if `pruned` is a store."""

    def step(context: LayerContext) -> None:
        if pruned is not None:
            pruned.load(model, context.number, "pruned")
        propagate(context)

    states = MemoryStore(range(count), record)
    LayerWalk(model, tokens.split(1), states).run(step)
    return states.take(count)


def _of_states(model: HuggingFaceModel, tokens: Tensor, states: Recorded) -> Perplexity:
    last = iter(states)

    def logits(batch: Tensor) -> Iterator[Tensor]:
        hidden = next(last)
        return (model.logits(batch, hidden, positions) for positions in model.pieces(batch))

    return perplexity_of(logits, tokens)


def _batch_nll(pieces: Iterable[Tensor], batch: Tensor) -> float:
    """The summed negative log-likelihood of a batch [windows window]."""
    losses, labels = list[Tensor](), batch[:, 1:]
    for logits in pieces:
        now, labels = labels[:, : logits.shape[1]].to(logits.device), labels[:, logits.shape[1] :]
        each = zip(logits, now, strict=True)
        losses.append(torch.stack([nn.functional.cross_entropy(z.float(), y, reduction="none") for z, y in each]))
    return sum(window.double().sum().item() for window in torch.cat(losses, 1))
