"""Correction targets: errors of operators' outputs caused by earlier pruned operators."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from convexprune._layerwise.capture import Observed
from convexprune._layerwise.model import DecoderLayer, Group
from convexprune._layerwise.settings import LayerSettings
from convexprune.core._moments import ErrorMoments


class CorrectionTargets:
    """Errors that `groups` of a stage, whose inputs the pruned layer changes, have to correct, by batch.

    `observed` has the observations of the dense `layer`, in which these groups still have dense weights. See
    `LayerSettings.error_target`.
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
        """Return True if errors are of the group's outputs [samples tokens m], not of its inputs [samples tokens n]."""
        return group is self._last_branch or group in self._weights

    def is_last_branch(self, stage: Sequence[Group]) -> bool:
        """Return True if the pass of this stage has to be `split_last_branch`."""
        return self._last_branch is not None and self._last_branch in stage

    def of(self, group: Group, i: int, x: Tensor, output: Tensor | None) -> Tensor | None:
        """Return the error [samples tokens n], or [samples tokens m] in output space, at x* of batch i, if there is
        any.

        `output` is the layer's with x* and W, if the group is its last residual branch.
        """
        if group is self._last_branch:
            assert output is not None
            return self._outputs[i].to(x.device).float() - output.float()
        if group not in self._inputs:
            return None
        change = self._inputs[group][i].to(x.device).float() - x.float()
        return change @ self._weights[group].to(change).T if group in self._weights else change


def width(group: Group) -> int:
    """Return n, the number of inputs."""
    return group.operators[0].shape[1]


def height(group: Group) -> int:
    """Return m, the number of outputs of all operators."""
    return sum(operator.shape[0] for operator in group.operators)


def weighted_parts(
    layer: str, group: Group, weights: Mapping[str, Tensor]
) -> Iterator[tuple[Group, slice, Tensor | None]]:
    """Divide a group into runs of operators with equal token weights, with rows and weights."""
    first = 0
    each = [(operator, weights.get(f"{layer}.{operator.name}")) for operator in group.operators]
    for _, alike in groupby(each, lambda pair: id(pair[1])):
        operators, same = zip(*alike, strict=True)
        part = group if len(operators) == len(each) else replace(group, operators=operators)
        yield part, slice(first, first := first + height(part)), same[0]


def stack_of(group: Group) -> Tensor:
    """Return the weights W [m n] of operators with a common input: their rows, in float32."""
    return torch.cat([operator.read().float() for operator in group.operators])
