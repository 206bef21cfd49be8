"""Choose the experts to remove: by the error of the mixture's output, or by REAP's score."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convexprune._device.precision import widened
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.pruners._base import Score

from .._huggingface import HuggingFaceModel
from .base import Making
from .mixtures import Mixture

TOKENS = 4096  # that outputs are compared on
NEXT = 8  # experts that stay are tried in the place of each that is to go
ROUNDS = 4  # of exchanges, if they gain so long

Inputs = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
"""The arguments of each call of a block."""


class Judged:
    """The block of a mixture, a `small` block with the remaining number of experts (`Mixture.graft`), and inputs."""

    def __init__(self, mixture: Mixture, block: nn.Module, small: nn.Module, inputs: Inputs) -> None:
        self.mixture, self.block, self.small, self.inputs = mixture, block, small, inputs
        self.dense = self._outputs(block)

    def error(self, gone: Collection[int]) -> float:
        """Return the summed square of the output's change without some experts."""
        found = self._outputs(self.mixture.without(self.small, self.block, gone))
        return sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(found, self.dense, strict=True))

    def reap(self, number: int) -> float:
        """Return the mean of g |f(x)| over the tokens x of an expert (arXiv 2510.13999, equation 9), or 0.

        The expert's output f, times the router's weight g, equals the block's loss if the expert's weights are zero:
        the router does not read these weights, and chooses the same.
        """
        own = [self.mixture.of_expert(n, t, number) for n, t in self.mixture.tensors(self.block).items()]
        held = [(part, part.clone()) for part in own if part is not None]
        try:
            for part, _ in held:
                part.zero_()
            found = self._outputs(self.block)
        finally:
            for part, values in held:
                part.copy_(values)
        sizes = torch.cat([(a - b).norm(dim=-1).flatten() for a, b in zip(self.dense, found, strict=True)])
        return float(sizes[sizes > 0].mean()) if bool(sizes.any()) else 0.0

    def _outputs(self, forward: Callable[..., Any]) -> list[Tensor]:
        found = list[Tensor]()
        for args, named in self.inputs:
            hidden = next(each for each in (*args, *named.values()) if isinstance(each, Tensor))
            with widened(hidden.device, hidden.dtype):
                output = forward(*args, **named)
            found.append((output if isinstance(output, Tensor) else output[0]).float())
        return found


@torch.no_grad()
def experts_to_remove(
    model: HuggingFaceModel,
    windows: Tensor,
    score: Score,
    mixtures: Sequence[tuple[Mixture, nn.Module]],
    count: int,
    record: Making,
) -> dict[str, list[int]]:
    """Return the numbers of the experts to remove by mixture, judged on ids [samples length] in the dense model.

    "reap": the lowest scores of REAP. "output": starting from these, removed and remaining experts are exchanged as
    long as the error of the block's output falls. Beside a mixture stands its block with the remaining number of
    experts.
    """
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    here = {mixture.layer: (mixture, small) for mixture, small in mixtures}
    found, report = dict[str, list[int]](), begin("choosing experts", len(here))

    def step(context: LayerContext) -> None:
        if (own := here.get(context.layer.name)) is None:
            context.hand_on(context.outputs())
            return
        mixture, small = own
        block = model.model.get_submodule(mixture.block)
        with recording(block) as inputs:
            context.hand_on(context.outputs())
        judged = Judged(mixture, block, small, inputs)
        found[mixture.layer] = sorted(chosen(judged, score, count))
        report(f"{mixture.layer}: {', '.join(map(str, found[mixture.layer]))}")

    LayerWalk(model, windows.split(1), MemoryStore(range(len(model.layers)), record)).run(step)
    return found


def chosen(judged: Judged, score: Score, count: int) -> list[int]:
    scores = [judged.reap(number) for number in range(judged.mixture.size)]
    order = sorted(range(judged.mixture.size), key=scores.__getitem__)
    gone = order[:count]
    if score == "reap":
        return gone
    best = judged.error(gone)
    for _ in range(ROUNDS):
        before = best
        for number in reversed(list(gone)):
            others = [each for each in order if each not in gone][:NEXT]
            tried = {each: judged.error([*(n for n in gone if n != number), each]) for each in others}
            least = min(tried, key=tried.__getitem__)
            if tried[least] < best:
                best, gone = tried[least], [*(n for n in gone if n != number), least]
        if best == before:
            break
    return gone


@contextmanager
def recording(block: nn.Module) -> Iterator[Inputs]:
    """Keep the arguments of all calls of a block during the context."""
    kept = list[tuple[tuple[Any, ...], Mapping[str, Any]]]()
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: kept.append((args, kwargs)), with_kwargs=True)
    with handle:
        yield kept
