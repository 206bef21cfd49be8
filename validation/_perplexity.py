"""Perplexity on fixed windows of text, as in the pruning literature."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convexprune import adapters
from convexprune._layerwise.folder_store import FolderStore
from convexprune._progress import begin
from convexprune.adapters import HuggingFaceModel, Logits, by_token, last_states, logits_in_pieces, of_states
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
        CalibrationError: there is no window, or none with a token to predict; the model cannot read the windows; or the
            batch size is not positive.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise CalibrationError(f"batch_size={batch_size!r}: a whole number of windows is needed, 1 at least.")
    windows = adapters.to_predict(tokens, model, type(model).__name__)
    return fit(windows, of_model(model), batch_size=batch_size)[0][0]


@torch.no_grad()
def fit(
    tokens: Tensor, *networks: Logits, batch_size: int = 1, counted: Tensor | None = None
) -> list[tuple[Perplexity, float]]:
    """Return the perplexity of each network on ids [windows window], and its divergence from the first.

    The divergence is the mean over the predicted tokens of KL(first || network), in nats. Logits are widened to float32
    by window, and sums are in float64; batches come once, in order. Of the tokens after the first of a window those
    count that are `counted` [windows window - 1], or all.
    """
    windows, window = tokens.shape
    counts = torch.ones(windows, window - 1) if counted is None else counted.float()
    batches, count = tokens.split(batch_size), int(counts.sum())
    step, total = begin("perplexity", len(batches)), torch.zeros(len(networks), 2, dtype=torch.float64)
    for batch, weights in zip(batches, counts.split(batch_size), strict=True):
        total += (by_token(batch, networks) * weights).double().sum((2, 3))
        step("")
    nll, kl = (total / count).T
    # torch's exponential, because Python's raises where the answer is infinity.
    values = zip(nll.exp().tolist(), nll.tolist(), strict=True)
    found = [Perplexity(*each, tokens=count, windows=windows, window=window, stride=window) for each in values]
    return list(zip(found, kl.tolist(), strict=True))


def of_model(model: PreTrainedModel) -> Logits:
    """Return the logits of a model without dropout; its modules are left in the modes that they were in."""

    def logits(batch: Tensor) -> Iterator[Tensor]:
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield from logits_in_pieces(model, batch.to(model.device))
        finally:
            for module in training:
                module.training = True

    return logits


@torch.no_grad()
def streamed_evaluation(model: HuggingFaceModel, tokens: Tensor, store: FolderStore) -> dict[str, dict[str, float]]:
    """Return the fields of `Perplexity` for "dense" and "pruned", with its KL divergence; a layer at a time."""
    with store.scratch(store.count) as record:
        states = [last_states(model, tokens, record, pruned) for pruned in (None, store)]
        (dense, _), (pruned, kl) = fit(tokens, *(of_states(model, each) for each in states))
    return {"dense": vars(dense), "pruned": {**vars(pruned), "kl": kl}}
