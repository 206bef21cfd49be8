"""The interface of removals, and cuts of parameters: the smaller model is written as an ordinary model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Size, Tensor
from transformers import PretrainedConfig, PreTrainedModel

from convexprune._layerwise.capture import Recorded
from convexprune._storage.tensors import ChangedEntry, Entry, Spec
from convexprune.constraints import Constraint
from convexprune.errors import ModelError
from convexprune.pruners import Score

from .._checkpoints.reading import parameters_on_meta
from .._huggingface import HuggingFaceModel

UNSET = ("inner", "intermediate", "ffn")  # parts of names: such a setting that is None follows from the hidden size
REFUSALS = (
    AssertionError, AttributeError, IndexError, KeyError, RuntimeError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip
"""Whatever a family raises for a size that it cannot have, or for what it builds of another kind then."""

Place = tuple[str, ...]
"""Where a setting is in the configuration: the names of those it is inside of, and its own."""
Shapes = dict[str, tuple[int, ...]]
"""Those of parameters, by name."""
T = TypeVar("T")


def settings_of(model: HuggingFaceModel) -> dict[str, Any]:
    if model.shards is None:
        return model.model.config.to_dict()
    return settings_in(model.shards.folder)


def settings_in(folder: Path) -> dict[str, Any]:
    """Return settings as transformers reads them: release 5 writes infinity as {"__float__": "Infinity"}."""
    return PretrainedConfig.get_config_dict(folder)[0]


def candidates(model: HuggingFaceModel, size: int) -> Iterator[Place]:
    """Yield settings that may declare a size: first settings with its value, then settings left to the model."""
    config = model.model.config
    text = config.get_text_config()
    nested = tuple(name for name, value in vars(config).items() if value is text)[:1]
    inside = _inside(config, settings_of(model)) if text is config else nested
    values = text.to_dict()
    yield from ((*inside, name) for name, value in values.items() if type(value) is int and value == size)
    yield from (
        (*inside, name) for name, value in values.items() if value is None and any(part in name for part in UNSET)
    )


def _inside(config: PretrainedConfig, settings: Mapping[str, Any]) -> Place:
    """Return where a checkpoint has the settings of its text, if transformers reads that alone: of Llama 4, say."""
    kind = config.model_type
    parts = (name for name, part in settings.items() if isinstance(part, dict) and part.get("model_type") == kind)
    return () if settings.get("model_type") == kind else tuple(parts)[:1]


def with_values(settings: Mapping[str, Any], values: Mapping[Place, Any]) -> dict[str, Any]:
    """Return settings with new values at some places."""
    changed = deepcopy(dict(settings))
    for (*inside, name), value in values.items():
        part = changed
        for each in inside:
            part = part.setdefault(each, {})
        part[name] = value
    return changed


def renumbered(name: str, lists: Iterable[str], gone: Collection[int]) -> str | None:
    """Return the name of a tensor after lists of modules have lost some numbers; None for a tensor that is lost."""
    for path in lists:
        if name.startswith(f"{path}."):
            number, _, rest = name[len(path) + 1 :].partition(".")
            at = int(number)
            return None if at in gone else f"{path}.{at - sum(other < at for other in gone)}.{rest}"
    return name


def built(model: PreTrainedModel, settings: Mapping[str, Any]) -> PreTrainedModel:
    for name in _inside(model.config, settings):
        settings = settings[name]
    with parameters_on_meta():
        return type(model)(type(model.config).from_dict(deepcopy(dict(settings))))


def parameter_shapes(model: PreTrainedModel) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def shapes_of(model: PreTrainedModel, settings: Mapping[str, Any]) -> Shapes:
    try:
        return parameter_shapes(built(model, settings))
    except REFUSALS:
        return {}


def require_shapes(model: PreTrainedModel, settings: Mapping[str, Any], expected: Shapes) -> None:
    """Check that a model with new settings has the expected parameters."""
    if (found := shapes_of(model, settings)) == expected:
        return
    name = next(n for n in (*expected, *found) if found.get(n) != expected.get(n))
    here, there = (list(s[name]) if name in s else "not there" for s in (expected, found))
    raise ModelError(
        f"The configuration of {type(model).__name__} cannot say what is removed and no more: in the model that it "
        f"then describes {name} is {there}; it should be {here}."
    )


@dataclass(frozen=True)
class Cut:
    """The removal along a dimension of a parameter, or of every expert inside."""

    dim: int  # of the parameter or of an expert's matrix
    # positions, by the number of the expert; None is the parameter itself
    removed: Mapping[int | None, tuple[int, ...]]
    reads: bool  # True if the channels are inputs: removed entries are zero

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        counts = {len(set(numbers)) for numbers in self.removed.values()}
        experts = None not in self.removed
        if len(counts) != 1 or (experts and self.removed.keys() != set(range(shape[0]))):
            raise ModelError(f"Of a parameter {list(shape)} not every expert loses as many channels.")
        dim, (count,) = self.dim + experts, counts
        return tuple(size - count if i == dim else size for i, size in enumerate(shape))

    def of(self, tensor: Tensor) -> Tensor:
        if None in self.removed:
            return tensor.index_select(self.dim, self._kept(None, tensor).to(tensor.device))
        parts = (part.index_select(self.dim, self._kept(i, part).to(part.device)) for i, part in enumerate(tensor))
        return torch.stack(list(parts))

    def back(self, small: Tensor, dense: Tensor) -> Tensor:
        """Put a remaining part back to its places; a `dense` tensor has the removed entries, unless they are inputs."""
        whole = torch.zeros_like(dense) if self.reads else dense.clone()
        for index in self.removed:
            part, values = (whole, small) if index is None else (whole[index], small[index])
            part.index_copy_(self.dim, self._kept(index, part).to(part.device), values.to(part))
        return whole

    def _kept(self, index: int | None, matrix: Tensor) -> Tensor:
        kept = torch.ones(matrix.shape[self.dim], dtype=torch.bool)
        kept[list(self.removed[index])] = False
        return kept.nonzero().flatten()

    def entry(self, whole: Entry) -> ChangedEntry:
        shape = self.shape(whole.spec.shape)
        nbytes = whole.spec.nbytes // Size(whole.spec.shape).numel() * Size(shape).numel()
        return ChangedEntry(whole.path, Spec(whole.spec.code, shape, nbytes), whole.begin, whole, self.of)


Making = Callable[[], Recorded]


@dataclass(frozen=True, eq=False)
class AbstractRemoval(ABC):
    """The removable parts of a dense model, and the number to remove; and the model without chosen parts."""

    chosen_first: ClassVar[bool] = False
    """True if `choose_by` decides before pruning; False if the pruned weights decide."""
    removed: Any = field(default=None, kw_only=True)
    """The removed parts as plain data; None before the choice. Methods about the smaller model need the choice."""

    @property
    def patterns(self) -> Mapping[str, Constraint]:
        """Return the patterns of operators that differ, by name."""
        return {}

    @property
    @abstractmethod
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """Numbers before and after, by the setting that declares them."""

    @abstractmethod
    def choose(self, model: HuggingFaceModel) -> tuple[str, ...]:
        """Let a `model` prune only operators that the removal concerns; return the targets that name them."""

    def choose_by(self, score: Score, model: HuggingFaceModel, windows: Tensor, record: Making) -> Any:
        """Decide the removed parts, judged on ids [samples length]."""
        raise NotImplementedError("the pruned weights say what is removed")

    def narrowed(self, read: Callable[[str], Tensor]) -> Self:
        """Return the removal of the parts that were chosen, or that the pruned weights do not use."""
        return self

    @abstractmethod
    def without(self, removed: Any) -> Self:
        """Return the removal of the given parts."""

    @abstractmethod
    def configured(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the smaller model's settings from the dense model's `settings`."""

    @cached_property
    def cuts(self) -> Mapping[str, Cut]:
        """Return the cut of every tensor that shrinks, by its name in the dense model."""
        return {}

    def renamed(self, name: str) -> str | None:
        """Return the name in the smaller model for a `name` in the dense model; None: removed."""
        return name

    def stand_in(self, model: HuggingFaceModel) -> None:
        """Let modules in which zeros of removed parts differ from their absence know both, if there are any."""
        return

    def _left(self, whole: Mapping[str, T], cut: Callable[[Cut, T], T]) -> Iterator[tuple[str, str, T]]:
        """Yield by tensor that is left its names in the dense and the smaller model, and what is left of it."""
        for name, each in whole.items():
            if (new := self.renamed(name)) is not None:
                yield name, new, cut(self.cuts[name], each) if name in self.cuts else each

    def shapes(self, whole: Shapes) -> Shapes:
        """Return the shapes of the remaining parameters, by name in the smaller model."""
        return {new: shape for _, new, shape in self._left(whole, Cut.shape)}

    def require_configured(self, model: HuggingFaceModel, settings: Mapping[str, Any]) -> None:
        require_shapes(model.model, settings, self.shapes(parameter_shapes(model.model)))

    def state(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the remaining tensors of the `whole` model, by name in the smaller model."""
        return {new: tensor for _, new, tensor in self._left(whole, Cut.of)}

    def emptied(self, layer: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return zeros in place of the removed parts of a decoder layer."""
        changed, cuts = dict[str, Tensor](), self.cuts
        for name, tensor in parameters.items():
            if self.renamed(whole := f"{layer}.{name}") is None:
                changed[name] = torch.zeros_like(tensor)
            elif whole in cuts:
                changed[name] = cuts[whole].back(cuts[whole].of(tensor), tensor)
        return changed

    @torch.no_grad()
    def widen(self, narrower: HuggingFaceModel, dense: HuggingFaceModel) -> None:
        """Give a `dense` model the weights, and so the function, of the `narrower` model; both are in memory."""
        cuts, small = self.cuts, narrower.model.state_dict()
        for name, tensor in dense.model.state_dict().items():
            if (renamed := self.renamed(name)) is None:
                tensor.zero_()
            else:
                tensor.copy_(cuts[name].back(small[renamed], tensor) if name in cuts else small[renamed])
        self.stand_in(dense)

    def entries(self, whole: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the places of the remaining tensors, by name in the `whole` model."""
        return {name: entry for name, _, entry in self._left(whole, Cut.entry)}

    def model(self, model: HuggingFaceModel) -> PreTrainedModel:
        """Return the smaller model, with the weights of a `model` that is whole in memory."""
        inner = model.model
        smaller = built(inner, self.configured(settings_of(model)))
        smaller.load_state_dict(self.state(inner.state_dict()), assign=True)
        smaller.tie_weights()
        smaller.generation_config = inner.generation_config
        smaller.name_or_path = inner.name_or_path
        return smaller.to(device=model.device).eval()  # pyright: ignore[reportCallIssue]

    def apply_to(self, model: HuggingFaceModel) -> HuggingFaceModel:
        narrower = copy(model)
        narrower.model = self.model(model)
        return narrower

    def note(self) -> dict[str, Any]:
        return {"widths": {name: list(pair) for name, pair in self.widths.items()}, "removed": self.removed}

    def sizes(self, model: HuggingFaceModel) -> dict[str, list[int]]:
        """Widths, and numbers of parameters, of a `model` before and after."""
        layers, whole = tuple(f"{layer.name}." for layer in model.layers), parameter_shapes(model.model)
        left = {name: shape for name, _, shape in self._left(whole, Cut.shape)}
        counts = [{name: Size(shape).numel() for name, shape in each.items()} for each in (whole, left)]
        decoder = [sum(count for name, count in each.items() if name.startswith(layers)) for each in counts]
        parameters = [sum(each.values()) for each in counts]
        return self.note()["widths"] | {"decoder_parameters": decoder, "parameters": parameters}
