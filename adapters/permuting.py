"""A model with its channels in an order of which N:M patterns prune less; it computes what it did."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from convexprune.errors import ModelError
from convexprune.model import AbstractOperator
from convexprune.pattern import SemiStructured
from convexprune.permutation import permutation, pruned_share
from convexprune.pipeline import RecordedCalls

from .channels import HIDDEN, Channels, close, hidden_channels, inner_channels
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
        return re.sub(r"\.\d+\.", ".*.", re.sub(r"\[\d+\]$", "", self.channels.name))


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
    search = _Search(model, _mean_squares(model, tokens, batch_size), pattern, seed)
    inner, done = inner_channels(model), Permutation(str(pattern))
    tell = progress(len(inner) + 1) if progress else lambda _: None
    dense = _probed(model, tokens)
    for name, sets in (("operators", inner), (HIDDEN, [hidden_channels(model)])):
        here = list[Permuted]()
        for channels in sets:
            if channels is None:
                done.left[name] = "a decoder layer computes something else with them in another order"
            elif channels.size % pattern.group:
                done.left[channels.name] = f"{channels.size} channels are no multiple of {pattern.group}"
            else:
                here.append(search(channels))
                channels.order(model.model, torch.tensor(here[-1].order))
                tell(here[-1])
        if not close(dense, _probed(model, tokens), model.model.dtype):
            for one in here:
                one.channels.order(model.model, torch.tensor(one.order).argsort())
            done.left[name] = "the model computes something else with them in another order"
            here.clear()
        done.permuted += here
    return done


def _probed(model: HuggingFaceModel, tokens: Tensor) -> Tensor:
    return model.model(tokens[:1, :PROBE].to(model.device), use_cache=False).logits


@dataclass(frozen=True, eq=False)
class _Search:
    """`squares` are the mean squares [n] of what the operators see, by the names of their parameters."""

    model: HuggingFaceModel
    squares: dict[str, Tensor]
    pattern: SemiStructured
    seed: int

    def __call__(self, channels: Channels) -> Permuted:
        scores = self.scores(channels)
        order = permutation(scores, self.pattern, seed=self.seed)
        before, after = (pruned_share(each, self.pattern) for each in (scores, scores[:, order]))
        return Permuted(channels, order.tolist(), before, after)

    def scores(self, channels: Channels) -> Tensor:
        """Those [rows size] of all that see the channels."""
        operators = _by_parameter(self.model)
        seen = [(operators[axis.parameter], axis.parameter, axis.start) for axis in channels.consumers]
        step = -(-sum(operator.shape[0] for operator, _, _ in seen) // ROWS)
        parts = []
        for operator, parameter, start in seen:
            scores = operator.read()[::step].float().square() * self.squares[parameter]
            parts.append(scores[:, start : start + channels.size] / scores.sum())
        return torch.cat(parts)


def _by_parameter(model: HuggingFaceModel) -> dict[str, AbstractOperator]:
    found = {}
    for layer in model.layers:
        for operator in layer.operators:
            assert isinstance(operator, ParameterOperator)
            found[f"{layer.name}.{operator.place.path}"] = operator
    return found


def _mean_squares(model: HuggingFaceModel, tokens: Tensor, batch_size: int) -> dict[str, Tensor]:
    """mean x_j^2 [n] of what each operator sees, by the name of its parameter; not of experts, which share one."""
    batches: Sequence[Tensor] = tokens.split(batch_size)
    calls = RecordedCalls(model, batches)
    hidden = [model.first_inputs(batch) for batch in batches]
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(model.layers):
        with ExitStack() as taps:
            for group in layer.groups:
                sums = torch.zeros(group.operators[0].shape[1], device=model.device)

                def add(x: Tensor, sums: Tensor = sums) -> None:
                    sums += x.float().square().flatten(0, -2).sum(0)

                taps.enter_context(group.tap(add))
                for operator in group.operators if group.paired else ():
                    assert isinstance(operator, ParameterOperator)
                    found[f"{layer.name}.{operator.place.path}"] = sums
            hidden = [calls.of(number)(batch)(layer.module, batch) for batch in hidden]
    return {name: sums / tokens.numel() for name, sums in found.items()}
