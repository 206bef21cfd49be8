"""The fit of networks to a text, and their divergence from the first of them: the dense model, say."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.context import LayerContext, propagate
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk

from .._huggingface import HuggingFaceModel

Logits = Callable[[Tensor], Iterable[Tensor]]  # of ids [windows window], by piece [windows positions vocabulary]


@dataclass(frozen=True)
class Likelihood:
    """The fit of a network to the windows of a text: means over all tokens after a window's first, in nats."""

    nll: tuple[float, ...]  # negative log-likelihood by window
    kl: tuple[float, ...]  # divergence from the dense model by window, sum_v p_dense(v) (ln p_dense(v) - ln p(v))


def last_states(
    model: HuggingFaceModel,
    tokens: Tensor,
    record: Callable[[], Recorded] = list,
    pruned: FolderStore | None = None,
) -> Recorded:
    """Return the hidden states [1 window hidden] after the last layer, by window; of pruned layers with a store."""

    def step(context: LayerContext) -> None:
        if pruned is not None:
            pruned.load(model, context.number, "pruned")
        propagate(context)

    count = len(model.layers)
    states = MemoryStore(range(count), record)
    LayerWalk(model, tokens.split(1), states).run(step)
    return states.take(count)


def of_states(model: HuggingFaceModel, states: Sequence[Tensor] | Recorded) -> Logits:
    """Return the logits of final hidden states [windows window hidden] by batch, in the order of the batches."""
    last = iter(states)

    def logits(batch: Tensor) -> Iterable[Tensor]:
        hidden = next(last)
        return (model.logits(batch, hidden, positions) for positions in model.pieces(batch))

    return logits


@torch.no_grad()
def likelihoods(
    model: HuggingFaceModel, batches: Sequence[Tensor], dense: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]]
) -> dict[str, Likelihood]:
    """Return the likelihoods of the dense model and of others, by final states."""
    networks = [of_states(model, states) for states in (dense, *others.values())]
    means = torch.cat([by_token(batch, networks).double().mean(3) for batch in batches], dim=2).tolist()
    return {name: Likelihood(*map(tuple, own)) for name, own in zip(("dense", *others), means, strict=True)}


def by_token(ids: Tensor, networks: Sequence[Logits]) -> Tensor:
    """Return [networks 2 windows window - 1] of ids [windows window]: negative log-likelihoods of the tokens after the
    first of a window, and divergences KL(first || network) there, in nats.

    Logits are widened to float32 by window. The first softmax is computed once.
    """
    parts, labels = list[Tensor](), ids[:, 1:]
    for pieces in zip(*(network(ids) for network in networks), strict=True):
        device, count = pieces[0].device, pieces[0].shape[1]
        now, labels = labels[:, :count].to(device), labels[:, count:]
        rows = [_of_window(own, [piece[row] for piece in pieces]) for row, own in enumerate(now)]
        parts.append(torch.stack(rows, dim=2).cpu())
    return torch.cat(parts, dim=3)


def _of_window(labels: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """Return [networks 2 positions] of a window's labels [positions] and logits [positions vocabulary] by network."""
    first = logits[0].float()
    probabilities = first.softmax(-1)
    entropy, found = _cross_entropy(probabilities, first), list[Tensor]()
    for each in logits:
        z = each.to(first.device).float()
        nll = cross_entropy(z, labels, reduction="none")
        found.append(torch.stack([nll, _cross_entropy(probabilities, z) - entropy]))
    return torch.stack(found)


def _cross_entropy(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Return -sum_v p(v) ln softmax(z)(v) by row."""
    return logits.logsumexp(-1) - torch.linalg.vecdot(probabilities, logits)
