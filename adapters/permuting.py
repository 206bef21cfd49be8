"""A model with its channels in an order of which N:M patterns prune less; it computes what it did."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convexprune.errors import ModelError
from convexprune.model import AbstractOperator, DecoderLayer
from convexprune.pattern import SemiStructured
from convexprune.permutation import permutation, pruned_share
from convexprune.pipeline import RecordedCalls

from .channels import HIDDEN, Channels, NotPermutable, close, hidden_channels, inner_channels
from .huggingface import HuggingFaceModel
from .operators import ParameterOperator

ROWS = 2**15  # of scores tell one order from another; they are taken evenly from all operators
PROBE = 64  # tokens on which the model has to compute what it did


@dataclass(frozen=True)
class Permuted:
    """A set of channels, the order [size] that they were put in, and the share of their scores that N:M prunes."""

    channels: Channels
    order: list[int]
    before: float
    after: float

    @property
    def kind(self) -> str:
        """Its name without numbers: of the same sets in all layers."""
        return re.sub(r"\.\d+\b", ".*", re.sub(r"\[\d+\]$", "", self.channels.name))


@dataclass
class Permutation:
    """The `pattern` that channels were permuted for, every set of them, and what stayed as it was, with the reason."""

    pattern: str
    permuted: list[Permuted] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it: `Channels.order` with the inverse of an order undoes it."""
        return asdict(self)


@torch.no_grad()
def permute_channels(
    model: HuggingFaceModel,
    tokens: Tensor,
    pattern: SemiStructured,
    batch_size: int = 1,
    seed: int = 0,
    progress: Callable[[int], Callable[[Permuted], None]] | None = None,
) -> Permutation:
    """Put the channels of a dense `model` in memory in an order of which an N:M pattern prunes less, in place.

    The scores are W_ij^2 mean x_j^2 (Wanda's, squared) on `tokens` [windows length], those of all operators that see a
    set of channels together, each relative to its sum. The sets are those inside of decoder layers, then the hidden
    states (`channels`). `progress` is called with the number of sets, returns what is called with each.

    Raises:
        ModelError: the model is not all in memory.
    """
    if any(parameter.is_meta for parameter in model.model.parameters()):
        raise ModelError(f"{model.name} is not whole in memory. Load it on one device to permute its channels.")
    inner, done = inner_channels(model), Permutation(str(pattern))
    tell = progress(len(inner) + 1) if progress else lambda _: None
    permuting = _Permuting(model, tokens[:1, :PROBE], _mean_squares(model, tokens, batch_size), pattern, seed, tell)
    permuting.permute(inner, "operators", done)
    try:
        permuting.permute([hidden_channels(model)], HIDDEN, done)
    except NotPermutable as cause:
        done.left[HIDDEN] = str(cause)
    return done


Key = tuple[str, int | None]
"""An operator: the parameter that holds it, and which matrix of it, if that is a pile."""


@dataclass(frozen=True, eq=False)
class _Permuting:
    """A model in work: `probe` [1 tokens] is what it is tried on, `squares` the mean squares [n] that operators see."""

    model: HuggingFaceModel
    probe: Tensor
    squares: dict[Key, Tensor]
    pattern: SemiStructured
    seed: int
    tell: Callable[[Permuted], None]

    def permute(self, sets: Sequence[Channels], name: str, done: Permutation) -> None:
        """Order these sets of channels; all are put back if the model then computes something else."""
        module, before, here = self.model.model, self._logits(), list[Permuted]()
        for channels in sets:
            if channels.size % self.pattern.group:
                done.left[channels.name] = f"{channels.size} channels are no multiple of {self.pattern.group}"
                continue
            here.append(self.found(channels))
            channels.order(module, torch.tensor(here[-1].order))
            self.tell(here[-1])
        if close(before, self._logits(), module.dtype):
            done.permuted += here
            return
        for one in here:
            one.channels.order(module, torch.tensor(one.order).argsort())
        done.left[name] = "the model computes something else with them in another order"

    def found(self, channels: Channels) -> Permuted:
        """An order for them."""
        scores = self.scores(channels)
        order = permutation(scores, self.pattern, seed=self.seed)
        before, after = (pruned_share(each, self.pattern) for each in (scores, scores[:, order]))
        return Permuted(channels, order.tolist(), before, after)

    def scores(self, channels: Channels) -> Tensor:
        """Those [rows size] of all that see the channels."""
        operators = _operators(self.model)
        step = -(-sum(operators[axis.parameter, axis.index].shape[0] for axis in channels.consumers) // ROWS)
        parts = []
        for axis in channels.consumers:
            key = axis.parameter, axis.index
            scores = operators[key].read()[::step].float().square() * self.squares[key]
            parts.append(scores[:, axis.start : axis.start + channels.size] / scores.sum())
        return torch.cat(parts)

    def _logits(self) -> Tensor:
        return self.model.model(self.probe.to(self.model.device), use_cache=False).logits


def _operators(model: HuggingFaceModel) -> dict[Key, AbstractOperator]:
    return {_key(layer, operator): operator for layer in model.layers for operator in layer.operators}


def _key(layer: DecoderLayer, operator: AbstractOperator) -> Key:
    assert isinstance(operator, ParameterOperator)
    return f"{layer.name}.{operator.place.path}", operator.place.index


def _mean_squares(model: HuggingFaceModel, tokens: Tensor, batch_size: int) -> dict[Key, Tensor]:
    """mean x_j^2 [n] of what each operator sees; of an expert that no token reaches, ones."""
    batches: Sequence[Tensor] = tokens.split(batch_size)
    calls = RecordedCalls(model, batches)
    hidden = [model.first_inputs(batch) for batch in batches]
    found: dict[Key, Tensor] = {}
    for number, layer in enumerate(model.layers):
        counted = {group: [torch.zeros(group.operators[0].shape[1], device=model.device), 0] for group in layer.groups}
        with ExitStack() as taps:
            for group in layer.groups:
                taps.enter_context(group.tap(partial(_count, counted[group])))
            hidden = [calls.of(number)(batch)(layer.module, batch) for batch in hidden]
        for group, (total, times) in counted.items():
            mean = total / times if times else torch.ones_like(total)
            found |= {_key(layer, operator): mean for operator in group.operators}
    return found


def _count(counted: list[Any], x: Tensor) -> None:
    counted[0] += x.float().square().flatten(0, -2).sum(0)
    counted[1] += x.numel() // x.shape[-1]
