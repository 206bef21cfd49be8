"""What every removal promises: what can go, and the smaller model without it, which is written as an ordinary one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor
from transformers import PreTrainedModel

from convexprune._layerwise.capture import Recorded
from convexprune._storage.tensors import Entry
from convexprune.constraints import Constraint
from convexprune.pruners._base import Score

from .._channels.configuration import built, require_shapes
from .._channels.cut import Cut, CutEntry
from .._huggingface import HuggingFaceModel

Making = Callable[[], Recorded]


class AbstractReduced(ABC):
    """A model without what was removed of it."""

    @property
    @abstractmethod
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """How many there were and are, by the names of the settings that say so."""

    @property
    @abstractmethod
    def removed(self) -> Any:
        """What was removed, for `AbstractRemoval.without`; JSON can hold it."""

    @abstractmethod
    def choose(self, model: HuggingFaceModel) -> tuple[str, ...]:
        """Have only those operators of their `model` pruned that adapt to the removal; the targets that name them."""

    @abstractmethod
    def configured(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The `settings` of the smaller model, from those of the dense one."""

    @cached_property
    def cuts(self) -> Mapping[str, Cut]:
        """What is left of each tensor that becomes smaller, by its name in the dense model."""
        return {}

    def renamed(self, name: str) -> str | None:
        """The name in the smaller model of what has that `name` in the dense one; None: it is gone."""
        return name

    def stand_ins(self, model: HuggingFaceModel) -> Mapping[str, Callable[..., Any]]:
        """Modules of a dense model for which zeros are not the same as nothing.

        Returns:
            By the name of the module a forward pass, which computes as the smaller model if what is removed is zero.
        """
        return {}

    def stand_in(self, model: HuggingFaceModel) -> None:
        """Have a dense `model` compute as the smaller one wherever what is removed is zero."""
        for name, forward in self.stand_ins(model).items():
            model.model.get_submodule(name).forward = forward

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of what is left of a parameter.

        Returns:
            The smaller shape; None if nothing is left.
        """
        if self.renamed(name) is None:
            return None
        return self.cuts[name].shape(shape) if name in self.cuts else shape

    def require_configured(self, model: HuggingFaceModel, settings: Mapping[str, Any]) -> None:
        """Check that settings are those of the smaller model."""
        whole = {name: tuple(p.shape) for name, p in model.model.named_parameters()}
        named = ((self.renamed(name), self.shape(name, shape)) for name, shape in whole.items())
        require_shapes(model.model, settings, {n: s for n, s in named if n is not None and s is not None})

    def state(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is left of the tensors of the `whole` model, by the names that they have in the smaller one."""
        cuts = self.cuts
        named = {name: self.renamed(name) for name in whole}
        return {new: cuts[n].of(whole[n]) if n in cuts else whole[n] for n, new in named.items() if new is not None}

    def emptied(self, layer: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a decoder layer has in place of what is removed of it: zeros."""
        changed, cuts = dict[str, Tensor](), self.cuts
        for name, tensor in parameters.items():
            if self.renamed(whole := f"{layer}.{name}") is None:
                changed[name] = torch.zeros_like(tensor)
            elif whole in cuts:
                changed[name] = cuts[whole].back(cuts[whole].of(tensor), tensor)
        return changed

    @torch.no_grad()
    def widen(self, narrower: HuggingFaceModel, dense: HuggingFaceModel) -> None:
        """Give a `dense` model the weights of the `narrower` one: it then computes the same, in its own size.

        Args:
            dense: the model that it was made of; both are whole in memory.
        """
        cuts, small = self.cuts, narrower.model.state_dict()
        for name, tensor in dense.model.state_dict().items():
            if (renamed := self.renamed(name)) is None:
                tensor.zero_()
            else:
                tensor.copy_(cuts[name].back(small[renamed], tensor) if name in cuts else small[renamed])
        self.stand_in(dense)

    def entries(self, whole: Mapping[str, Entry]) -> dict[str, Entry]:
        """Where what is left of tensors is, by the names of the `whole` ones in the model."""
        cuts, left = self.cuts, [name for name in whole if self.renamed(name) is not None]
        return {name: CutEntry.without(whole[name], cuts[name]) if name in cuts else whole[name] for name in left}

    def model(self, model: HuggingFaceModel) -> PreTrainedModel:
        """The smaller model, with the weights of a `model` that is whole in memory."""
        inner = model.model
        smaller = built(inner, self.configured(inner.config.to_dict()))
        smaller.load_state_dict(self.state(inner.state_dict()), assign=True)
        smaller.tie_weights()
        smaller.generation_config = inner.generation_config
        smaller.name_or_path = inner.name_or_path
        return smaller.to(device=model.device).eval()  # pyright: ignore[reportCallIssue]

    def apply_to(self, model: HuggingFaceModel) -> HuggingFaceModel:
        """The smaller of a `model` that is whole in memory, with its tokenizer."""
        narrower = copy(model)
        narrower.model = self.model(model)
        return narrower

    def note(self) -> dict[str, Any]:
        """What the file beside the result says that names what was removed."""
        return {"widths": {name: list(pair) for name, pair in self.widths.items()}, "removed": self.removed}

    def sizes(self, model: HuggingFaceModel) -> dict[str, list[int]]:
        """Widths, and numbers of parameters, of a `model` before and after."""
        layers = tuple(f"{layer.name}." for layer in model.layers)
        whole, decoder = [0, 0], [0, 0]
        for name, parameter in model.model.named_parameters():
            shape = self.shape(name, tuple(parameter.shape))
            pair = parameter.numel(), 0 if shape is None else Size(shape).numel()
            for total in (whole, decoder) if name.startswith(layers) else (whole,):
                total[:] = (a + b for a, b in zip(total, pair, strict=True))
        return self.note()["widths"] | {"decoder_parameters": decoder, "parameters": whole}


class AbstractRemoval(ABC):
    """What of a dense model can be removed, and how much of it is to be."""

    @property
    @abstractmethod
    def patterns(self) -> Mapping[str, Constraint]:
        """What operators are pruned to that differ in it, by name."""

    @abstractmethod
    def choose(self, model: HuggingFaceModel) -> tuple[str, ...]:
        """Have only those operators of their `model` pruned that may be concerned; the targets that name them."""

    @property
    def chosen_first(self) -> bool:
        """Whether `choose_by` decides what is removed before anything is pruned, and not the pruned weights."""
        return False

    def choose_by(self, score: Score, model: HuggingFaceModel, windows: Tensor, record: Making) -> Any:
        """Decide what is removed.

        Args:
            windows: token ids [samples length] to judge by.
        """
        raise NotImplementedError("the pruned weights say what is removed")

    def narrowed(self, read: Callable[[str], Tensor]) -> AbstractReduced:
        """The model without what the pruned weights make no use of."""
        raise NotImplementedError("what is removed was decided before")

    @abstractmethod
    def without(self, removed: Any) -> AbstractReduced:
        """The model without some of it."""
