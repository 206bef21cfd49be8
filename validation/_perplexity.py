"""Perplexity on fixed windows of text, as in the pruning literature."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from convexprune.adapters import HuggingFaceModel, divergence, logits_in_pieces
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


Logits = Callable[[Tensor], Iterable[Tensor]]  # of ids [windows window], by piece [windows positions vocabulary]


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
    return fit(tokens, of_model(model), batch_size=batch_size)[0][0]


@torch.no_grad()
def fit(
    tokens: Tensor, *networks: Logits, batch_size: int = 1, counted: Tensor | None = None
) -> list[tuple[Perplexity, float]]:
    """Return the perplexity of each network on ids [windows window], and its divergence from the first.

    The divergence is the mean over the predicted tokens of KL(first || network), in nats. Logits are widened to float32
    by window, and sums are in float64; batches come once, in order. Of the tokens after the first of a window those
    count that are `counted` [windows window - 1], or all.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"Perplexity needs windows of 2 or more tokens [windows window]; got {list(tokens.shape)}."
        )
    if batch_size < 1:
        raise CalibrationError(f"batch_size={batch_size}: at least 1 is needed.")
    windows, window = tokens.shape
    counts = torch.ones(windows, window - 1) if counted is None else counted.float()
    batches, count = tokens.split(batch_size), int(counts.sum())
    step, nll, kl = begin("perplexity", len(batches)), [0.0] * len(networks), [0.0] * len(networks)
    for batch, weights in zip(batches, counts.split(batch_size), strict=True):
        losses, labels, done = [list[Tensor]() for _ in networks], batch[:, 1:], 0
        for first, *others in zip(*(network(batch) for network in networks), strict=True):
            now, labels = labels[:, : first.shape[1]].to(first.device), labels[:, first.shape[1] :]
            own, done = weights[:, done : done + now.shape[1]].to(first.device), done + now.shape[1]
            losses[0].append(_losses(first, now) * own)
            for i, other in enumerate(others, 1):
                logits = other.to(first.device)
                losses[i].append(_losses(logits, now) * own)
                kl[i] += (divergence(first.float(), logits.float()) * own).double().sum().item()
        nll = [a + sum(w.double().sum().item() for w in torch.cat(b, 1)) for a, b in zip(nll, losses, strict=True)]
        step("")
    means = torch.as_tensor(nll, dtype=torch.float64) / count
    # torch's exponential, because Python's raises where the answer is infinity.
    values = zip(means.exp().tolist(), means.tolist(), strict=True)
    found = [Perplexity(*each, tokens=count, windows=windows, window=window, stride=window) for each in values]
    return [(each, total / count) for each, total in zip(found, kl, strict=True)]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihoods [windows positions] of labels, window by window."""
    pairs = zip(logits, labels, strict=True)
    return torch.stack([nn.functional.cross_entropy(z.float(), y, reduction="none") for z, y in pairs])


def of_model(model: PreTrainedModel) -> Logits:
    """Return the logits of a model without dropout; the model is left in the mode that it was in."""

    def logits(batch: Tensor) -> Iterator[Tensor]:
        training = model.training
        model.eval()
        try:
            yield from logits_in_pieces(model, batch.to(model.device))
        finally:
            model.train(training)

    return logits


def of_states(model: HuggingFaceModel, states: Sequence[Tensor] | Recorded) -> Logits:
    """Return the logits of final hidden states [1 window hidden], in the order of the windows."""
    last = iter(states)

    def logits(batch: Tensor) -> Iterator[Tensor]:
        hidden = next(last)
        return (model.logits(batch, hidden, positions) for positions in model.pieces(batch))

    return logits


@torch.no_grad()
def streamed_evaluation(model: HuggingFaceModel, tokens: Tensor, store: FolderStore) -> dict[str, dict[str, float]]:
    """Return the fields of `Perplexity` for "dense" and "pruned", with the KL divergence of the pruned model.

    A single decoder layer is in memory at a time. The store has the pruned layers, and place for hidden states.
    """
    with store.scratch(store.count) as record:
        states = [_last_states(model, tokens, record, store.count, pruned) for pruned in (None, store)]
        (dense, _), (pruned, kl) = fit(tokens, *(of_states(model, each) for each in states))
    return {"dense": vars(dense), "pruned": {**vars(pruned), "kl": kl}}


@contextmanager
def final_states(model: HuggingFaceModel, windows: int) -> Iterator[list[Tensor]]:
    """Record the hidden states [1 window hidden] after the last decoder layer of a model in memory, on the CPU.

    The list is complete at the end of the block; some families pass a window twice.
    """
    states = list[Tensor]()

    def record(_: nn.Module, __: object, output: Any) -> None:
        states.append((output if isinstance(output, Tensor) else output[0]).detach().cpu())

    with model.layers[-1].module.register_forward_hook(record):
        yield states
    states[:] = states[:: len(states) // windows]


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
