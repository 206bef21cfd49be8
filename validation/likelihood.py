"""How well final hidden states predict a text, and how far from the dense model's predictions they are."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.adapters import HuggingFaceModel


@dataclass(frozen=True)
class Likelihood:
    """Of each window of a text: the mean negative log-likelihood, and the mean KL divergence from the dense model.

    Both in nats, over the predicted tokens: each token after the first, from those before it in its window.
    `kl` is mean sum_v p_dense(v) (ln p_dense(v) - ln p(v)).
    """

    nll: tuple[float, ...]
    kl: tuple[float, ...]


@torch.no_grad()
def likelihoods(
    model: HuggingFaceModel, windows: Tensor, dense: Tensor, others: Mapping[str, Tensor]
) -> dict[str, Likelihood]:
    """The likelihood of `windows` [windows tokens] for the dense model, named "dense", and for each of the others.

    `dense` and each of `others` are the windows' final hidden states [windows tokens hidden]. The dense model's
    probabilities are computed once a window, for all.
    """
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("dense", *others)}
    for i, ids in enumerate(windows):

        def logits(hidden: Tensor, ids: Tensor = ids) -> Tensor:
            return model.logits(ids[None], hidden[None].to(model.device))[0, :-1].float()

        reference = logits(dense[i])
        targets = ids[1:].to(reference.device)
        probabilities = reference.softmax(-1)
        entropy = _cross_entropy(probabilities, reference)
        for name, (nll, kl) in found.items():
            z = reference if name == "dense" else logits(others[name][i])
            chosen = z.gather(1, targets[:, None])[:, 0]
            nll.append((z.logsumexp(-1) - chosen).double().mean().item())
            kl.append((_cross_entropy(probabilities, z) - entropy).double().mean().item())
    return {name: Likelihood(tuple(nll), tuple(kl)) for name, (nll, kl) in found.items()}


def _cross_entropy(probabilities: Tensor, logits: Tensor) -> Tensor:
    """-sum_v p(v) ln softmax(z)(v) of each row."""
    return logits.logsumexp(-1) - torch.linalg.vecdot(probabilities, logits)
