"""The squared error of a decoder layer's outputs, as a function of the values that may move."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from convexprune._layerwise.capture import Calls, Reached
from convexprune._layerwise.model import AbstractOperator
from convexprune._layerwise.pipeline import in_dtype
from convexprune._layerwise.processes import ALONE, ProcessGroup
from convexprune.constraints import Grid, Scales
from convexprune.errors import ModelError

Values = dict[str, Tensor]  # by operator


class _PlainAttention(TorchFunctionMode):
    """Attention by products and a softmax, in this thread alone: the other kernels have no second derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class Kept:
    """The non-zero entries of a weight [m n]: values x relative to their size, zero for the weight from before."""

    before: Tensor

    @cached_property
    def _size(self) -> Tensor:
        kept = (self.before != 0).float()
        return kept * (self.before.float().square().sum() / kept.sum().clamp_min(1)).sqrt()

    def zero(self) -> Tensor:
        return torch.zeros_like(self._size)

    def weight(self, x: Tensor) -> Tensor:
        return self.before.float() + self._size * x

    def stored(self, x: Tensor) -> Tensor:
        return in_dtype(self.weight(x), self.before != 0, self.before, self.before.dtype)


@dataclass(frozen=True, eq=False)
class OnGrid(Kept):
    """The scales of a weight [m n] on a grid, likewise; codes stay."""

    grid: Grid

    @cached_property
    def _found(self) -> tuple[Tensor, Tensor]:
        scales, codes, _ = self.grid.find(self.before)
        return scales, codes.float()

    def zero(self) -> Tensor:
        return torch.zeros_like(self._found[0])

    def weight(self, x: Tensor) -> Tensor:
        scales, codes = self._found
        return self.grid.weight(codes, Scales(scales * (1 + x)))

    def stored(self, x: Tensor) -> Tensor:
        scales, codes = self._found
        moved = self.grid.weight(codes, self.grid.rounded(Scales(scales * (1 + x)))).to(self.before.dtype)
        return torch.where((moved == 0) == (codes == 0), moved, self.before)


@dataclass(frozen=True, eq=False)
class LayerError:
    """The sum of |f(x) - y|^2 over tokens and ranks, in float32: f is the layer, or the submodule `end`; y is dense."""

    module: nn.Module
    calls: Calls
    operators: Mapping[str, AbstractOperator]
    movable: Mapping[str, Kept]
    inputs: Sequence[Tensor]
    target: Callable[[int], Tensor]  # y [batch tokens hidden] of a batch
    energy: Callable[[int], Tensor]  # what errors are relative to, likewise
    weights: Callable[[int], Tensor | None] = lambda _: None  # [batch tokens]
    known: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()  # inside, submodules are replayed
    end: nn.Module | None = None
    ranks: ProcessGroup = ALONE

    def __post_init__(self) -> None:
        assert len(self._places) + len(self._state)  # inside of a derivative parameters are not where they are

    def of(self, movable: Mapping[AbstractOperator, Kept]) -> "LayerError":
        """Return the error as a function of the values of some operators."""
        named = {operator.name: operator for operator in movable}
        return replace(self, operators=named, movable={o.name: each for o, each in movable.items()})

    def zero(self) -> Values:
        return {name: each.zero() for name, each in self.movable.items()}

    def stored(self, x: Values) -> Values:
        return {name: each.stored(x[name]) for name, each in self.movable.items()}

    def relative(self, x: Values, numbers: Sequence[int]) -> float:
        """Return the error of stored weights on some batches, over the energy of what the dense layer adds."""
        weights, sums = {name: each.float() for name, each in self.stored(x).items()}, [0.0, 0.0]
        for i in numbers:
            sums[0] += float(self._weighted(self._outputs(weights, i) - self.target(i), i).square().sum())
            sums[1] += float(self._weighted(self.energy(i), i).square().sum())
        error, energy = self.ranks.all_reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
        return error / energy if energy > 0 else 0.0

    def tokens(self, numbers: Sequence[int]) -> int:
        return int(self.ranks.all_reduce(torch.tensor(sum(self.inputs[i].shape[:2].numel() for i in numbers))))

    def gradient(self, x: Values, numbers: Sequence[int]) -> tuple[Values, float]:
        """Return the gradient of half of the sum on some batches, and this half."""
        half = torch.zeros((), dtype=torch.float64)

        def of_batch(i: int) -> Values:
            outputs, pull = self._linearised(x, i)
            half.add_(outputs.square().sum().double().cpu() / 2)
            return pull(outputs)

        return self._sum(of_batch, numbers), float(self.ranks.all_reduce(half))

    def product(self, x: Values, direction: Values, numbers: Sequence[int]) -> Values:
        """Return J' J d on some batches, with the derivative J of the outputs at x."""

        def of_batch(i: int) -> Values:
            outputs, pull = self._linearised(x, i)
            return pull(vjp(pull, torch.zeros_like(outputs))[1](direction)[0])

        with _PlainAttention():
            return self._sum(of_batch, numbers)

    def squared_slopes(self, x: Values, numbers: Sequence[int]) -> Values:
        """Estimate the diagonal of J' J, by random signs at the outputs (Hutchinson 1989)."""
        generator = torch.Generator().manual_seed(0)

        def of_batch(i: int) -> Values:
            outputs, pull = self._linearised(x, i)
            signs = torch.randint(2, outputs.shape, generator=generator).to(outputs) * 2 - 1
            return {name: each.square() for name, each in pull(signs).items()}

        return self._sum(of_batch, numbers)

    def _sum(self, of_batch: Callable[[int], Values], numbers: Sequence[int]) -> Values:
        total = self.zero()
        for i in numbers:
            for name, each in of_batch(i).items():
                total[name] += each
        return {name: self.ranks.all_reduce(each) for name, each in total.items()}

    def _linearised(self, x: Values, i: int) -> tuple[Tensor, Callable[[Tensor], Values]]:
        """Return sqrt(w) (f(x) - y) of a batch, and the product of J' with such a tensor."""
        try:
            found = vjp(lambda x: self._residual(x, i), x)
        except RuntimeError as cause:
            if "setup_context" not in str(cause):
                raise
            kind = type(self.module).__name__
            raise ModelError(
                f"{kind} has an autograd.Function that torch.func cannot differentiate. Leave refine out."
            ) from cause
        return found[0], lambda outputs: found[1](outputs)[0]

    def _residual(self, x: Values, i: int) -> Tensor:
        weights = {name: each.weight(x[name]) for name, each in self.movable.items()}
        return self._weighted(self._outputs(weights, i) - self.target(i), i)

    def _weighted(self, outputs: Tensor, i: int) -> Tensor:
        weights = self.weights(i)
        return outputs if weights is None else outputs * weights.to(outputs).sqrt()[..., None]

    def _outputs(self, weights: Values, i: int) -> Tensor:
        hidden, state, seen = self.inputs[i], dict(self._state), list[Tensor]()
        call = tree_map(wide, (self.calls(hidden).args, dict(self.calls(hidden).kwargs)))
        for name, weight in weights.items():
            place = self._places[name]
            state[place.name] = place.put(state[place.name], weight)

        def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen.append(output if isinstance(output, Tensor) else output[0])
            raise Reached

        with self.known(i), ExitStack() as hooks, suppress(Reached):
            if self.end is not None:
                hooks.callback(self.end.register_forward_hook(keep).remove)
            output = functional_call(self.module, state, (wide(hidden.to(self._device)), *call[0]), call[1])
            seen.append(output if isinstance(output, Tensor) else output[0])
        return seen[0].reshape(hidden.shape)

    @cached_property
    def _state(self) -> Values:
        both = chain(self.module.named_parameters(), self.module.named_buffers())
        return {name: wide(each.detach()) for name, each in both}

    @cached_property
    def _places(self) -> "dict[str, Place]":
        return {name: Place.of(operator, self.module) for name, operator in self.operators.items()}

    @property
    def _device(self) -> torch.device:
        return next(iter(self.operators.values())).read().device


@dataclass(frozen=True)
class Place:
    """The part of a parameter that is an operator's weight: all, its transpose, or a slice of a stack."""

    name: str
    view: tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides and offset

    @classmethod
    def of(cls, operator: AbstractOperator, module: nn.Module) -> "Place":
        view = operator.read()
        for name, parameter in module.named_parameters():
            offset = (view.data_ptr() - parameter.data_ptr()) // view.itemsize
            if parameter.device == view.device and 0 <= offset < parameter.numel() and parameter.is_contiguous():
                return cls(name, (tuple(view.shape), view.stride(), offset))
        raise ModelError(
            f"{operator.name} is no part of a parameter in memory, so refine has nothing to move. Load the model onto "
            "one device, or take refine='none'."
        )

    def put(self, whole: Tensor, weight: Tensor) -> Tensor:
        is_whole = self.view[:2] == (whole.shape, whole.stride())
        return weight if is_whole else whole.as_strided_scatter(weight, *self.view)


def wide(each: Any) -> Any:
    """Return a tensor of real numbers in float32, and all else as it is."""
    return each.float() if isinstance(each, Tensor) and each.is_floating_point() else each
