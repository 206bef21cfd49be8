"""How well final hidden states predict a text, and how far from the dense model's predictions they are."""

from collections.abc import Mapping, Sequence
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
    model: HuggingFaceModel, batches: Sequence[Tensor], dense: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]]
) -> dict[str, Likelihood]:
    """The likelihood of windows for the dense model, named "dense", and for each of the others.

    `batches` [batch tokens] are the windows' token ids, `dense` and each of `others` their final hidden states
    [batch tokens hidden]. The dense model's probabilities are computed once a window, for all.
    """
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("dense", *others)}
    places = [(i, row) for i, batch in enumerate(batches) for row in range(len(batch))]
    for i, row in places:
        ids = batches[i][row]

        def logits(states: Sequence[Tensor], i: int = i, row: int = row, ids: Tensor = ids) -> Tensor:
            return model.logits(ids[None], states[i][row][None])[0, :-1].float()

        reference = logits(dense)
        targets = ids[1:].to(reference.device)
        probabilities = reference.softmax(-1)
        entropy = _cross_entropy(probabilities, reference)
        for name, (nll, kl) in found.items():
            z = reference if name == "dense" else logits(others[name])
            chosen = z.gather(1, targets[:, None])[:, 0]
            nll.append((z.logsumexp(-1) - chosen).double().mean().item())
            kl.append((_cross_entropy(probabilities, z) - entropy).double().mean().item())
    return {name: Likelihood(tuple(nll), tuple(kl)) for name, (nll, kl) in found.items()}


def _cross_entropy(probabilities: Tensor, logits: Tensor) -> Tensor:
    """-sum_v p(v) ln softmax(z)(v) of each row."""
    return logits.logsumexp(-1) - torch.linalg.vecdot(probabilities, logits)
