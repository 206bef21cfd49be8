"""All that the pipeline may ask of a language model; it knows neither transformers nor any architecture."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Call:
    """How a model calls one of its decoder layers: every argument but the hidden states, recorded and replayed.

    Arguments are never named here, because their names change between releases of transformers.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output [batch tokens hidden]; some families return it inside a tuple."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One decoder layer and its operators in the order of execution.

    `stages` groups the names of the operators (relative to `module`) that share an input: what one stage outputs,
    a later stage sees. For LLaMA: q, k, v | o | gate, up | down.
    """

    name: str
    module: nn.Module
    stages: tuple[tuple[str, ...], ...]

    def operator(self, name: str) -> nn.Linear:
        """The operator of that (relative) name."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear), f"{self.name}.{name} is a {type(module).__name__}"
        return module


class AbstractModel(ABC):
    """A language model seen as: tokens -> hidden states -> decoder layer -> ... -> decoder layer."""

    name: str
    layers: Sequence[DecoderLayer]

    @abstractmethod
    def first_inputs(self, batch: Tensor) -> Tensor:
        """The hidden states [batch tokens hidden] that enter the first decoder layer for `batch` [batch tokens]."""

    @abstractmethod
    def calls(self, batch: Tensor) -> list[Call]:
        """How each decoder layer is called for a batch of this shape; recorded on one real forward pass."""
