"""Choose the decoder layers to remove: by predictions, or by the change of hidden states."""

from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.context import LayerContext, propagate, recorded
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.pruners._base import Score

from .._data.likelihood import likelihoods
from .._huggingface import HuggingFaceModel
from .base import Making

TOKENS = 2048  # that predictions are compared on
LEAST = 8  # layers that a round tries, if there are as many


@torch.no_grad()
def layers_to_remove(
    model: HuggingFaceModel, windows: Tensor, score: Score, allowed: Iterable[int], count: int, record: Making
) -> list[int]:
    """Return the numbers of the layers to remove, judged on ids [samples length].

    "divergence": in turn, remove the layer without which the predictions are nearest to the dense predictions, given
    earlier removals; first all layers are tried, then the better half of the last trial. "influence": remove layers
    with the least 1 - mean cos(h, h'), which is ShortGPT (arXiv 2403.03853).
    """
    if score == "influence":
        found = influences(model, windows, record)
        return sorted(allowed, key=found.__getitem__)[:count]
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    gone, tried, dense = list[int](), list(allowed), _final(model, windows, record)
    step = begin("choosing layers", count)
    for left in range(count, 0, -1):
        diverged = divergences(model, windows, dense, gone, tried, record)
        tried.sort(key=diverged.__getitem__)
        gone.append(tried.pop(0))
        tried = tried[: max(LEAST, len(tried) // 2, left - 1)]
        step(f"{model.layers[gone[-1]].name}: {diverged[gone[-1]]:.3f} nats from dense")
    return gone


def influences(model: HuggingFaceModel, windows: Tensor, record: Making) -> list[float]:
    """Return the block influence of every layer: 1 - mean cos(h, h').

    The output of the last layer is taken after the final norm, as in the code of ShortGPT: transformers' list of
    hidden states ends there.
    """
    found, batches = list[float](), windows.split(1)

    def step(context: LayerContext) -> None:
        outputs = after = context.outputs()
        if context.number == len(model.layers) - 1:
            after = [model.normed(*pair) for pair in zip(batches, outputs, strict=True)]
        pairs = zip(context.inputs["dense"], after, strict=True)
        found.append(1 - fmean(float(_cosine(*pair).mean()) for pair in pairs))
        context.hand_on(outputs)

    LayerWalk(model, batches, MemoryStore(range(len(model.layers)), record)).run(step)
    return found


def _cosine(h: Tensor, after: Tensor) -> Tensor:
    return torch.cosine_similarity(h.to(after.device).float(), after.float(), -1)


def divergences(
    model: HuggingFaceModel,
    windows: Tensor,
    dense: Sequence[Tensor],
    gone: Sequence[int],
    tried: Iterable[int],
    record: Making,
) -> dict[int, float]:
    """Return, by one more layer left out, the mean KL(dense || without) in nats; a single walk serves all trials.

    `dense` are the hidden states [1 length hidden] after the last layer of the dense model, by window.
    """
    states: dict[str, Sequence[Tensor]] = {}  # of what differs from what is left of the model by now

    def step(context: LayerContext) -> None:
        number, entering = context.number, context.inputs["dense"]

        def leaving(hidden: Sequence[Tensor]) -> list[Tensor]:
            if number in gone:
                return list(hidden)
            calls = ((x.to(model.device), context.calls(x)) for x in hidden)
            return [call(context.layer.module, x).cpu() for x, call in calls]

        for name in states:
            states[name] = leaving(states[name])
        if number in wanted:
            states[str(number)] = [x.cpu() for x in entering]
        context.hand_on(recorded(leaving(entering), context.record()))

    wanted, batches = set(tried), windows.split(1)
    LayerWalk(model, batches, MemoryStore(range(len(model.layers)), record)).run(step)
    found = likelihoods(model, batches, dense, states)
    return {number: fmean(found[str(number)].kl) for number in wanted}


def _final(model: HuggingFaceModel, windows: Tensor, record: Making) -> Recorded:
    """Return the hidden states of the dense model after its last layer."""
    states = MemoryStore(range(len(model.layers)), record)
    LayerWalk(model, windows.split(1), states).run(propagate)
    return states.take(len(model.layers))
