"""Passes through one decoder layer: what the dense one shows, and what the operators of a stage see."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convexprune.model import Call, DecoderLayer, Group
from convexprune.pipeline.shortcut import Shortcut, looking_for_shortcuts
from convexprune.pipeline.tensors import Batches

Calls = Callable[[Tensor], Call]
Recorded = list[Tensor] | Batches


@dataclass(frozen=True, eq=False)
class Observed:
    """What the dense decoder layer makes of each batch: its outputs, and each paired group's inputs on the CPU.

    `shortcuts` are what later passes of the layer may leave out.
    """

    outputs: Recorded
    inputs: Mapping[Group, Recorded]
    shortcuts: Mapping[Group, Shortcut] = field(default_factory=dict)


@torch.no_grad()
def observe(
    layer: DecoderLayer, calls: Calls, batches: Sequence[Tensor], record: Callable[[], Recorded] = list
) -> Observed:
    """One pass of the dense layer over all batches; `record` makes a place to keep them, in memory or on disk.

    `calls` gives the other arguments for a batch. What is recorded: tokens times the widths of the stages.
    The first batch shows the shortcuts, too.
    """
    inputs = {group: record() for group in layer.groups if group.paired}
    outputs, shortcuts = record(), dict[Group, Shortcut]()
    for batch in batches:
        with ExitStack() as taps:
            if not outputs:
                taps.enter_context(looking_for_shortcuts(layer, len(batch), shortcuts))
            for group, seen in inputs.items():

                def keep(x: Tensor, seen: Recorded = seen, samples: int = len(batch)) -> None:
                    seen.append(_by_sample(x, samples).cpu())

                taps.enter_context(group.tap(keep))
            outputs.append(calls(batch)(layer.module, batch))
    return Observed(outputs, inputs, shortcuts)


def stage_inputs(layer: DecoderLayer, stage: Sequence[Group], call: Call, batch: Tensor) -> dict[Group, Tensor]:
    """What the groups of a stage see [samples tokens n]; the layer is run no further than that.

    Of a group that is not paired all tokens count as one sample; one that no token reaches is left out.
    """
    seen: dict[Group, Tensor] = {}
    if not stage:
        return seen
    with ExitStack() as taps:
        for group in stage:

            def keep(x: Tensor, group: Group = group) -> None:
                seen[group] = _by_sample(x, len(batch) if group.paired else 1)
                if len(seen) == len(stage):
                    raise _Reached

            taps.enter_context(group.tap(keep))
        with suppress(_Reached):
            call(layer.module, batch)
    return seen


class _Reached(Exception):
    """Ends a forward pass."""


def _by_sample(x: Tensor, samples: int) -> Tensor:
    return x.reshape(samples, -1, x.shape[-1])
