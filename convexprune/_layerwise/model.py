"""All that the pipeline may ask of a language model; it knows neither transformers nor any architecture."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from convexprune._device.products import widened


@dataclass(frozen=True, eq=False)
class Call:
    """How a model calls one of its decoder layers: every argument but the hidden states, recorded and replayed.

    Arguments are never named here, because their names change between releases of transformers.

    Args:
        args: the positional arguments behind the hidden states.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The layer's output [batch tokens hidden]; some families return it inside a tuple."""
        with widened(hidden.device, hidden.dtype):
            output = layer(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


class AbstractOperator(ABC):
    """One linear map y = W x of a decoder layer, however its weight is stored."""

    name: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs."""

    @abstractmethod
    def read(self) -> Tensor:
        """W [m n] as it is stored, in its dtype and on its device; not to be written to."""

    @abstractmethod
    def write(self, weight: Tensor) -> None:
        """Store `weight` [m n], rounded to the dtype of the model."""


class InputHook(Protocol):
    """Inside the context of hook(heard), heard(inputs [... n]) is called with what reaches the operators."""

    @property
    def module(self) -> nn.Module:
        """Where it listens."""
        ...

    def __call__(self, heard: Callable[[Tensor], None]) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, eq=False)
class ModuleInput:
    """The hook on the first argument of a `module`."""

    module: nn.Module

    @contextmanager
    def __call__(self, heard: Callable[[Tensor], None]) -> Iterator[None]:
        with self.module.register_forward_pre_hook(lambda _, args: heard(args[0])):
            yield


@contextmanager
def computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module computes another function in place of its own."""
    own = vars(module).get("forward")  # hooks of other libraries may stand there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@dataclass(frozen=True, eq=False)
class Group:
    """Operators that share an input: one Gram matrix, one stacked problem.

    Args:
        token_aligned: whether the dense and the pruned layer send the same tokens here, so that an operator can correct
            earlier errors token by token. Not so behind a router.
    """

    operators: tuple[AbstractOperator, ...]
    input_hook: InputHook
    token_aligned: bool = True


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One decoder layer and its operators in the order of execution.

    What one stage outputs, a later stage may see; the groups of one stage do not see each other. For LLaMA, with one
    group a stage: q, k, v | o | gate, up | down.
    """

    name: str
    module: nn.Module
    stages: tuple[tuple[Group, ...], ...]

    @property
    def groups(self) -> list[Group]:
        """All groups in the order of execution."""
        return [group for stage in self.stages for group in stage]

    @property
    def operators(self) -> list[AbstractOperator]:
        """All operators in the order of execution."""
        return [operator for group in self.groups for operator in group.operators]


class AbstractModel(ABC):
    """A language model seen as: tokens -> hidden states -> decoder layer -> ... -> decoder layer."""

    name: str
    layers: Sequence[DecoderLayer]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the hidden states are computed."""

    @property
    @abstractmethod
    def streams(self) -> bool:
        """Whether the weights of a decoder layer are in memory only inside of `resident`."""

    @abstractmethod
    def resident(self, layer: DecoderLayer) -> AbstractContextManager[None]:
        """Inside, the weights of a layer are in memory.

        If the model streams they are then always the dense ones, and what was written to them is forgotten afterwards.
        """

    @abstractmethod
    def prefetch(self, layer: DecoderLayer) -> None:
        """A hint that `layer` will be resident soon: what is far away may come nearer meanwhile."""

    @abstractmethod
    def state(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """The tensors of a `layer` that is resident, by their names in it."""

    @abstractmethod
    def load_state(self, layer: DecoderLayer, state: Mapping[str, Tensor]) -> None:
        """Copy tensors into a layer that is resident."""

    @abstractmethod
    def keep(self, layer: DecoderLayer) -> None:
        """Note the weights of a `layer` that is about to change, if they may have to come back."""

    @abstractmethod
    def first_inputs(self, batch: Tensor) -> Tensor:
        """The hidden states [batch tokens hidden] that enter the first decoder layer, for a `batch` [batch tokens]."""

    @abstractmethod
    def calls(self, batch: Tensor) -> list[Call]:
        """How each decoder layer is called for a `batch` [batch tokens] of this shape."""
