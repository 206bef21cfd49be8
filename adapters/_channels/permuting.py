"""Find an order of a model's channels in which N:M patterns prune less."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune._layerwise.context import LayerContext, propagate
from convexprune._layerwise.model import AbstractOperator, DecoderLayer
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.constraints import Constraint
from convexprune.core._permutation import permutation, pruned_fraction
from convexprune.errors import ModelError

from .._huggingface import HuggingFaceModel
from .channels import HIDDEN, Axis, Channels, NotPermutable, close, columns, hidden_channels
from .inner_channels import inner_channels

ROWS = 2**15  # of scores tell one order from another; they are taken evenly from all operators
PROBE = 64  # tokens on which the model has to compute what it did


@dataclass(frozen=True)
class Permuted:
    """A set of channels and its new order."""

    channels: Channels
    order: list[int]
    before: float  # the pruned fraction of the scores in the former order
    after: float  # the pruned fraction in the new order

    @property
    def kind(self) -> str:
        """Name of the set without numbers: equal for corresponding sets of all layers."""
        return _kind(self.channels.name)


@dataclass(repr=False)
class Permutation:
    """Every set of channels with its order, and channels that stay in place: `left` has the reasons by name.

    An operator without a set of inputs is named without the numbers of its layer and expert.
    """

    pattern: str
    permuted: list[Permuted] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Permutation(for {self.pattern}: {len(self.permuted)} sets of channels; {len(self.left)} left)"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: `Channels.order` with the inverse of an order undoes the order."""
        return asdict(self)

    def apply(self, model: nn.Module) -> None:
        """Reorder the channels of a `model` in memory."""
        for one in self.permuted:
            one.channels.order(model, torch.tensor(one.order))


@torch.no_grad()
def find_permutation(
    model: HuggingFaceModel, tokens: Tensor, pattern: Constraint, batch_size: int = 1, seed: int = 0
) -> Permutation:
    """Find an order of a dense model's channels in which an N:M pattern prunes less, by `tokens` [windows length].

    The scores are W_ij^2 mean x_j^2 (Wanda's, squared), of all operators that read a set of channels, relative to their
    sums. The sets are inside decoder layers, and the hidden states (`channels`); a single decoder layer is in memory at
    a time. The model is tried in the new order on a few tokens, and a set that changes the function stays in place. The
    model is not changed.
    """
    if not model.streams and any(parameter.is_meta for parameter in model.model.parameters()):
        raise ModelError(f"{model.name} is offloaded: permute its folder (output_dir=), or load it on one device.")
    done = Permutation(str(pattern))
    inner, hidden = _fitting(inner_channels(model), pattern, done), list[Channels]()
    try:
        hidden = _fitting([hidden_channels(model)], pattern, done)
    except NotPermutable as cause:
        done.left[HIDDEN] = str(cause)
    step = begin("permuting", len(inner) + len(hidden))

    def find(channels: Channels, scores: Tensor) -> Permuted:
        order = permutation(scores, pattern, seed=seed)
        shares = (pruned_fraction(each, pattern) for each in (scores, scores[:, order]))
        found = Permuted(channels, order.tolist(), *shares)
        step(f"{channels.name}  {found.before:.4f} -> {found.after:.4f}")
        return found

    found = _found(model, tokens.split(batch_size), inner, hidden, find)
    probe = tokens[:1, :PROBE]
    dense = _logits(model, probe, [])
    for name, sets in zip(("operators", HIDDEN), found, strict=True):
        if close(dense, _logits(model, probe, [*done.permuted, *sets]), model.model.dtype):
            done.permuted += sets
        else:
            done.left[name] = "the model computes something else with them in another order"
    done.left |= {name: "its inputs stay in their order" for name in _unpermuted(model, done)}
    return done


def _found(
    model: HuggingFaceModel,
    batches: Sequence[Tensor],
    inner: Sequence[Channels],
    hidden: Sequence[Channels],
    find: Callable[[Channels, Tensor], Permuted],
) -> tuple[list[Permuted], list[Permuted]]:
    """Return the results of `find` for the sets inside layers and for the sets through all layers, in a single pass."""
    found, parts, stride = list[Permuted](), list[Tensor](), _stride(model.model, hidden)

    def step(context: LayerContext) -> None:
        scores, name = _propagate_and_score(context), context.layer.name
        mine = [one for one in inner if one.name.startswith(f"{name}.")]
        found.extend(find(one, scores(one, _stride(model.model, [one]))) for one in mine)
        parts.extend(scores(one.within([name]), stride) for one in hidden)

    LayerWalk(model, batches, MemoryStore(range(len(model.layers)))).run(step)
    return found, [find(one, torch.cat(parts)) for one in hidden]


def _unpermuted(model: HuggingFaceModel, done: Permutation) -> Iterator[str]:
    permuted = {(axis.parameter, axis.index) for one in done.permuted for axis in one.channels.consumers}
    for layer in model.layers:
        for operator in layer.operators:
            axis = _columns(layer, operator)
            if (axis.parameter, axis.index) not in permuted:
                yield _kind(f"{layer.name}.{operator.name}")


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\b", ".*", re.sub(r"\[\d+\]$", "", name))


def _columns(layer: DecoderLayer, operator: AbstractOperator) -> Axis:
    axis = columns(operator)
    return replace(axis, parameter=f"{layer.name}.{axis.parameter}")


def _fitting(sets: Sequence[Channels], pattern: Constraint, done: Permutation) -> list[Channels]:
    odd = [one for one in sets if one.size % pattern.block]
    done.left |= {one.name: f"{one.size} channels are no multiple of {pattern.block}" for one in odd}
    return [one for one in sets if one not in odd]


def _stride(model: nn.Module, sets: Sequence[Channels]) -> int:
    """Return the stride of rows that leaves about `ROWS` of all that read the channels."""
    axes = [axis for one in sets for axis in one.consumers]
    rows = sum(axis.of(model.get_parameter(axis.parameter)).shape[1 - axis.dim] for axis in axes)
    return max(1, -(-rows // ROWS))


def _propagate_and_score(context: LayerContext) -> Callable[[Channels, int], Tensor]:
    """Run the layer, and return a function for the scores [rows size] of its operators on a set of channels."""
    groups, device = context.layer.groups, context.model.device
    seen = {group: _Squares(group.operators[0].shape[1], device) for group in groups}
    with ExitStack() as hooks:
        for group, squares in seen.items():
            hooks.enter_context(group.input_hook(squares.add))
        propagate(context)
    return partial(_scores, context.layer, {o: s.mean for g, s in seen.items() for o in g.operators})


def _scores(layer: DecoderLayer, squares: Mapping[AbstractOperator, Tensor], channels: Channels, step: int) -> Tensor:
    """Return scores [rows size] of operators that read the channels, by mean `squares` [n], of every `step`-th row."""
    seen = {_columns(layer, operator): operator for operator in squares}
    parts = []
    for axis in channels.consumers:
        operator = seen[replace(axis, start=0)]
        scores = operator.read()[::step].float().square() * squares[operator]
        total = scores.sum().clamp_min(torch.finfo(scores.dtype).tiny)  # inputs may all be dead
        parts.append(scores[:, axis.start : axis.start + channels.size] / total)
    return torch.cat(parts)


class _Squares:
    """The mean square [n] of a group's inputs; 1 for an expert without tokens."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._sum, self._count = torch.zeros(inputs, device=device), 0

    def add(self, x: Tensor) -> None:
        self._sum += x.float().square().flatten(0, -2).sum(0)
        self._count += x.numel() // x.shape[-1]

    @property
    def mean(self) -> Tensor:
        return self._sum / self._count if self._count else torch.ones_like(self._sum)


def _logits(model: HuggingFaceModel, probe: Tensor, permuted: Sequence[Permuted]) -> Tensor:
    names = [layer.name for layer in model.layers]
    states = MemoryStore(range(len(names)))
    walk = LayerWalk(model, [probe], states)

    def step(context: LayerContext) -> None:
        with _ordered(model.model, permuted, partial(Channels.within, layers=[context.layer.name])):
            propagate(context)

    with _ordered(model.model, permuted, lambda channels: channels.within(names, within=False)):
        walk.run(step)
        return model.logits(probe, states.take(len(names))[0])


@contextmanager
def _ordered(model: nn.Module, permuted: Sequence[Permuted], part: Callable[[Channels], Channels]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in permuted:
            stack.enter_context(part(one.channels).ordered(model, torch.tensor(one.order)))
        yield
