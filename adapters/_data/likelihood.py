"""The fit of final hidden states to a text, and their divergence from the dense model's predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._huggingface import HuggingFaceModel


@dataclass(frozen=True)
class Likelihood:
    """The fit of a network to the windows of a text: means over all tokens after a window's first, in nats."""

    nll: tuple[float, ...]  # negative log-likelihood by window
    kl: tuple[float, ...]  # divergence from the dense model by window, sum_v p_dense(v) (ln p_dense(v) - ln p(v))


@torch.no_grad()
def likelihoods(
    model: HuggingFaceModel, batches: Sequence[Tensor], dense: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]]
) -> dict[str, Likelihood]:
    """Return the likelihoods of the dense model and of others, by final states; the dense softmax is computed once."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("dense", *others)}
    for i, batch in enumerate(batches):
        states = {"dense": dense[i], **{name: other[i] for name, other in others.items()}}
        for row, ids in enumerate(batch):
            window = _window(model, ids[None], {name: hidden[row][None] for name, hidden in states.items()})
            for name, means in window.items():
                for values, mean in zip(found[name], means, strict=True):
                    values.append(mean)
    return {name: Likelihood(tuple(nll), tuple(kl)) for name, (nll, kl) in found.items()}


def _window(model: HuggingFaceModel, ids: Tensor, states: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return, for a window of ids [1 tokens], the mean negative log-likelihood and the mean divergence by network."""
    parts: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in states}
    for positions in model.pieces(ids):
        reference = model.logits(ids, states["dense"], positions)[0].float()
        targets = ids[0, positions.to(ids.device) + 1].to(reference.device)
        probabilities = reference.softmax(-1)
        entropy = _cross_entropy(probabilities, reference)
        for name, (nll, kl) in parts.items():
            z = reference if name == "dense" else model.logits(ids, states[name], positions)[0].float()
            nll.append(z.logsumexp(-1) - z.gather(1, targets[:, None])[:, 0])
            kl.append(_cross_entropy(probabilities, z) - entropy)
    return {name: [torch.cat(part).double().mean().item() for part in both] for name, both in parts.items()}


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """Return sum_v p_dense(v) (ln p_dense(v) - ln p(v)) [...], in nats, of logits [... vocabulary]."""
    probabilities = dense.softmax(-1)
    return _cross_entropy(probabilities, other) - _cross_entropy(probabilities, dense)


def _cross_entropy(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Return -sum_v p(v) ln softmax(z)(v) by row."""
    return logits.logsumexp(-1) - torch.linalg.vecdot(probabilities, logits)
