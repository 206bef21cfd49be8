"""Which experts a mixture does best without: by the error of its output, or by what they add where they are chosen."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convexprune._device.products import widened
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerContext, LayerWalk
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
    """The block of a mixture, and what enters it.

    Args:
        small: the block of a model with as many experts as are to stay; see `Mixture.graft`.
    """

    def __init__(self, mixture: Mixture, block: nn.Module, small: nn.Module, inputs: Inputs) -> None:
        self.mixture, self.block, self.small, self.inputs = mixture, block, small, inputs
        self.dense = self._outputs(block)

    def error(self, gone: Collection[int]) -> float:
        """What the output changes by without some experts.

        Returns:
            The summed square.
        """
        found = self._outputs(self.mixture.without(self.small, self.block, gone))
        return sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(found, self.dense, strict=True))

    def reap(self, number: int) -> float:
        """The mean of g |f(x)| over the tokens x that are sent to an expert (arXiv 2510.13999, equation 9).

        What its output f, times the weight g of the router, adds to the block's is what the block loses if the weights
        of the expert are zero: the router, which does not read them, chooses the same.

        Returns:
            The score; 0 if no token is sent to it.
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
    """The numbers of the experts to remove of each mixture, each judged by what enters it in the dense model.

    Args:
        windows: token ids [samples length] to judge by.
        score: "reap": those with the lowest score of REAP. "output": from these on, experts that go and experts that
            stay are exchanged as long as the error of the block's output becomes smaller.
        mixtures: the experts of each layer that has some, and its block with as few as are to stay.
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
    """The numbers of the experts that a block does best without."""
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
    """Inside, the arguments of all calls of a block are kept."""
    kept = list[tuple[tuple[Any, ...], Mapping[str, Any]]]()
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: kept.append((args, kwargs)), with_kwargs=True)
    with handle:
        yield kept
