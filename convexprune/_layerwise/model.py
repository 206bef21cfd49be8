"""The interface of language models: no transformers, no architecture."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from convexprune._device.precision import widened


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of a decoder layer after the hidden states, recorded and replayed without names, which change."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Return the layer's output [batch tokens hidden]; some families wrap the output in a tuple."""
        with widened(hidden.device, hidden.dtype):
            output = layer(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


class AbstractOperator(ABC):
    """A linear map y = W x of a decoder layer, in any form of storage."""

    name: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs."""

    @abstractmethod
    def read(self) -> Tensor:
        """Return W [m n] as stored, in its dtype and on its device; read-only."""

    @abstractmethod
    def write(self, weight: Tensor) -> None:
        """Store `weight` [m n], rounded to the dtype of the model."""


@contextmanager
def put_back(operators: Iterable[AbstractOperator]) -> Iterator[None]:
    """Give operators their weights back after the context."""
    before = {operator: operator.read().clone() for operator in operators}
    try:
        yield
    finally:
        for operator, weight in before.items():
            operator.write(weight)


class InputHook(Protocol):
    """Inside the context of hook(heard), heard(inputs [... n]) is called with the inputs of the operators."""

    @property
    def module(self) -> nn.Module:
        """The module with the hook."""
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
    """Replace a module's function during the context."""
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
    """Operators with a common input: a Gram matrix, a stacked problem.

    Token-aligned: the dense and the pruned layer send the same tokens here, so that an operator can correct earlier
    errors by token. False behind a router.
    """

    operators: tuple[AbstractOperator, ...]
    input_hook: InputHook
    token_aligned: bool = True

    @property
    def device(self) -> torch.device:
        return self.operators[0].read().device


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """A decoder layer and its operators in the order of execution.

    Outputs of a stage may reach later stages; groups of a stage do not see each other. For LLaMA, with a group per
    stage: q, k, v | o | gate, up | down.
    """

    name: str
    module: nn.Module
    stages: tuple[tuple[Group, ...], ...]

    @property
    def groups(self) -> list[Group]:
        return [group for stage in self.stages for group in stage]

    @property
    def operators(self) -> list[AbstractOperator]:
        return [operator for group in self.groups for operator in group.operators]


class AbstractModel(ABC):
    """A language model seen as: tokens -> hidden states -> decoder layer -> ... -> decoder layer."""

    name: str
    layers: Sequence[DecoderLayer]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the hidden states."""

    @property
    @abstractmethod
    def streams(self) -> bool:
        """True if the weights of a decoder layer are in memory only inside `resident`."""

    @abstractmethod
    def resident(self, layer: DecoderLayer) -> AbstractContextManager[None]:
        """Hold a layer's weights in memory, dense if streamed; changes are then forgotten at the end."""

    @abstractmethod
    def prefetch(self, layer: DecoderLayer) -> None:
        """Announce that `layer` will be resident soon, so that its weights can come nearer."""

    @abstractmethod
    def state(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Return the tensors of a resident `layer`, by name in the layer."""

    @abstractmethod
    def load_state(self, layer: DecoderLayer, state: Mapping[str, Tensor]) -> None:
        """Copy tensors into a layer that is resident."""

    @abstractmethod
    def keep(self, layer: DecoderLayer) -> None:
        """Note the weights of a `layer` before a change, if they may have to be restored."""

    @abstractmethod
    def first_inputs(self, batch: Tensor) -> Tensor:
        """The hidden states [batch tokens hidden] that enter the first decoder layer, for a `batch` [batch tokens]."""

    @abstractmethod
    def calls(self, batch: Tensor) -> list[Call]:
        """Return the calls of the decoder layers for a `batch` [batch tokens] of this shape."""
