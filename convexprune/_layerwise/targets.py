"""What operators are to make up for: what their outputs lack because of the operators that are pruned before them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from convexprune._layerwise.capture import Observed
from convexprune._layerwise.model import DecoderLayer, Group
from convexprune._layerwise.settings import LayerSettings
from convexprune.core._error_moments import ErrorMoments


class CorrectionTargets:
    """Errors that the `groups` of a stage are to make up for, batch by batch (see `LayerSettings.error_target`).

    `observed` shows the dense `layer`, to which these groups belong and in which they have their dense weights.

    Args:
        groups: those whose inputs the pruned layer changes.
    """

    def __init__(
        self, groups: Iterable[Group], layer: DecoderLayer, observed: Observed, settings: LayerSettings
    ) -> None:
        spared = () if settings.quantizer.corrects_last else layer.stages[-1]
        corrected = [g for g in groups if g.token_aligned and g not in spared] if settings.correction > 0 else []
        ends = settings.error_target == "residual_stream" and observed.last_branch in corrected
        self._last_branch = observed.last_branch if ends else None
        self._outputs = observed.outputs
        self._inputs = {group: observed.inputs[group] for group in corrected if group is not self._last_branch}
        cheaper = () if settings.quantizer.input_errors else self._inputs
        self._weights = {g: stack_of(g) for g in cheaper if ErrorMoments.cheaper_in_output_space(height(g), width(g))}

    def in_output_space(self, group: Group) -> bool:
        """Whether it is told of the group's outputs [samples tokens m], not of its inputs [samples tokens n]."""
        return group is self._last_branch or group in self._weights

    def is_last_branch(self, stage: Sequence[Group]) -> bool:
        """Whether the pass of this stage is to be that of `split_last_branch`."""
        return self._last_branch is not None and self._last_branch in stage

    def of(self, group: Group, i: int, x: Tensor, output: Tensor | None) -> Tensor | None:
        """At x* [samples tokens n] of batch i, if anything lacks at all; `output` is the layer's with x* and W.

        Args:
            x: x* [samples tokens n].
            output: of the layer as it is by now, if the group is its last residual branch.

        Returns:
            What is lacked [samples tokens n], or [samples tokens m] in output space; None if nothing is corrected.
        """
        if group is self._last_branch:
            assert output is not None
            return self._outputs[i].to(x.device).float() - output.float()
        if group not in self._inputs:
            return None
        change = self._inputs[group][i].to(x.device).float() - x.float()
        return change @ self._weights[group].to(change).T if group in self._weights else change


def width(group: Group) -> int:
    """n, its inputs."""
    return group.operators[0].shape[1]


def height(group: Group) -> int:
    """m, the outputs of all its operators."""
    return sum(operator.shape[0] for operator in group.operators)


def weighted_parts(
    layer: str, group: Group, weights: Mapping[str, Tensor]
) -> Iterator[tuple[Group, slice, Tensor | None]]:
    """Divide a group into runs of operators whose tokens have the same weights: each with its rows and its weights."""
    first = 0
    each = [(operator, weights.get(f"{layer}.{operator.name}")) for operator in group.operators]
    for _, alike in groupby(each, lambda pair: id(pair[1])):
        operators, same = zip(*alike, strict=True)
        part = group if len(operators) == len(each) else replace(group, operators=operators)
        yield part, slice(first, first := first + height(part)), same[0]


def stack_of(group: Group) -> Tensor:
    """The weights of operators that share an input [m n]: their rows, in float32.

    Returns:
        W [m n] in float32.
    """
    return torch.cat([operator.read().float() for operator in group.operators])
