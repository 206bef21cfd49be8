"""Remove decoder layers for good: the layers to remove, a shorter model, and its configuration."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from convexprune._layerwise.context import LayerContext, recorded
from convexprune._layerwise.model import Call, DecoderLayer
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.constraints import Constraint, check_some
from convexprune.errors import ModelError
from convexprune.pruners import Score

from .._data.likelihood import last_states, likelihoods
from .._discovery.family import decoder_layers
from .._discovery.probing import of_each_kind
from .._huggingface import HuggingFaceModel
from . import base

TOKENS = 2048  # that predictions are compared on
LEAST = 8  # layers that a round tries, if there are as many


@torch.no_grad()
def layers_to_remove(
    model: HuggingFaceModel, windows: Tensor, score: Score, allowed: Iterable[int], count: int, record: base.Making
) -> list[int]:
    """Return the numbers of the layers to remove, judged on ids [samples length].

    "divergence": in turn, remove the layer without which the predictions are nearest to the dense predictions, given
    earlier removals; first all layers are tried, then the better half of the last trial. "influence": remove layers
    with the least 1 - mean cos(h, h'), which is ShortGPT (arXiv 2403.03853).
    """
    if score == "influence":
        found = influences(model, windows, record)
        return sorted(allowed, key=found.__getitem__)[:count]
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    gone, tried, dense = list[int](), list(allowed), last_states(model, windows, record)
    step = begin("choosing layers", count)
    for left in range(count, 0, -1):
        diverged = divergences(model, windows, dense, gone, tried, record)
        tried.sort(key=diverged.__getitem__)
        gone.append(tried.pop(0))
        tried = tried[: max(LEAST, len(tried) // 2, left - 1)]
        step(f"{model.layers[gone[-1]].name}: {diverged[gone[-1]]:.3f} nats from dense")
    return gone


def influences(model: HuggingFaceModel, windows: Tensor, record: base.Making) -> list[float]:
    """Return 1 - mean cos(h, h') of every layer; of the last after the final norm, as in the code of ShortGPT."""
    found, batches = list[float](), windows.split(1)

    def step(context: LayerContext) -> None:
        outputs = after = context.outputs()
        if context.number == len(model.layers) - 1:
            after = [model.normed(*pair) for pair in zip(batches, outputs, strict=True)]
        pairs = zip(context.inputs["dense"], after, strict=True)
        cosines = (torch.cosine_similarity(h.to(a.device).float(), a.float(), -1) for h, a in pairs)
        found.append(1 - fmean(float(cosine.mean()) for cosine in cosines))
        context.hand_on(outputs)

    LayerWalk(model, batches, MemoryStore(range(len(model.layers)), record)).run(step)
    return found


def divergences(
    model: HuggingFaceModel,
    windows: Tensor,
    dense: Sequence[Tensor],
    gone: Sequence[int],
    tried: Iterable[int],
    record: base.Making,
) -> dict[int, float]:
    """Return the mean KL(dense || without) in nats by one more layer left out; a single walk serves all."""
    states: dict[str, Sequence[Tensor]] = {}  # of what differs from what is left of the model by now

    def step(context: LayerContext) -> None:
        number, entering = context.number, context.inputs["dense"]

        def leaving(hidden: Sequence[Tensor]) -> list[Tensor]:
            if number in gone:
                return list(hidden)
            calls = ((x.to(model.device), context.calls(x)) for x in hidden)
            return [call(context.layer.module, x).cpu() for x, call in calls]

        for name in states:
            states[name] = leaving(states[name])
        if number in wanted:
            states[str(number)] = [x.cpu() for x in entering]
        context.hand_on(recorded(leaving(entering), context.record()))

    wanted, batches = set(tried), windows.split(1)
    LayerWalk(model, batches, MemoryStore(range(len(model.layers)), record)).run(step)
    found = likelihoods(model, batches, dense, states)
    return {number: fmean(found[str(number)].kl) for number in wanted}


OWN = ("layer_idx", "layer_id", "layer_number", "training")  # what differs between modules that are alike


@dataclass(frozen=True, eq=False)
class Shortening(base.AbstractRemoval):
    """The removal of decoder layers: `removed` are their numbers."""

    chosen_first: ClassVar[bool] = True
    layers: tuple[str, ...]  # names of all layers
    count: int
    place: base.Place  # of the setting with the number of layers
    lists: Mapping[str, Sequence[Any]]  # settings with an entry per layer, or with numbers of layers
    allowed: tuple[int, ...] = ()  # numbers of the removable layers

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        return {".".join(self.place): (len(self.layers), len(self.layers) - self.count)}

    def choose(self, model: HuggingFaceModel) -> tuple[str, ...]:
        """Choose the operators behind a removed layer; without a removal, the last layer's; before the choice, all."""
        if self.removed is None:
            model.choose(("Linear",))
            return ("Linear",)
        kept = [number for number in range(len(self.layers)) if number not in self.removed]
        behind = [model.layers[number] for number in kept if number > self.removed[0] or number == kept[-1]]
        names = tuple(f"{layer.name}.{operator.name}" for layer in behind for operator in layer.operators)
        model.choose(names, because="no layer before it is removed")
        return names

    def choose_by(self, score: Score, model: HuggingFaceModel, windows: Tensor, record: base.Making) -> list[int]:
        return layers_to_remove(model, windows, score, self.allowed, self.count, record)

    def without(self, removed: Collection[int]) -> Self:
        if len(set(removed)) != self.count or not set(removed) <= set(self.allowed):
            raise ModelError(f"Layers {sorted(removed)} cannot go: {self.count} of {list(self.allowed)} have to.")
        return replace(self, removed=sorted(set(removed)))

    def renamed(self, name: str) -> str | None:
        return base.renumbered(name, [self.layers[0].rpartition(".")[0]], self.removed)

    def configured(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        *inside, _ = self.place
        count, gone = len(self.layers), self.removed
        values: dict[base.Place, Any] = {self.place: count - len(gone)}
        for name, listed in self.lists.items():
            if _are_numbers(name, listed, count):
                kept = [value - sum(g < value for g in gone) for value in listed if value not in gone]
            else:
                kept = [value for number, value in enumerate(listed) if number not in gone]
            values[*inside, name] = kept
        return base.with_values(settings, values)

    def require_configured(self, model: HuggingFaceModel, settings: Mapping[str, Any]) -> None:
        if (why := self.why_not(model.model, settings)) is not None:
            raise ModelError(f"{model.name}: config.json is not that of the model without these layers: {why}.")

    def why_not(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> str | None:
        """Return why settings do not describe the dense model without these layers; None if they do."""
        try:
            shorter = base.built(model, settings)
        except base.REFUSALS as error:
            return str(error)
        if base.parameter_shapes(shorter) != self.shapes(base.parameter_shapes(model)):
            return "its parameters are others"
        _, whole = decoder_layers(model)
        kept = [layer for number, layer in enumerate(whole) if number not in self.removed]
        for number, (one, other) in enumerate(zip(kept, decoder_layers(shorter)[1], strict=True)):
            if _said_of(one) != _said_of(other):
                return f"its layer {number} is of another kind"
        return None


def find_shortening(model: HuggingFaceModel, pattern: Constraint) -> Shortening:
    """Find the removable decoder layers of a dense model.

    A layer is removable if it does nothing once all of its parameters are zero, and if a model built without memory
    with one layer less has exactly the remaining layers: every layer is tried. Settings with an entry per layer lose
    the entry; numbers of layers are shifted. One layer stays that a hybrid model needs (`_needed`).
    """
    count, left = len(model.layers), pattern.width(len(model.layers))
    check_some(pattern.sparsity, count, "decoder layers")
    _require_residual(model)
    config = model.model.config.get_text_config()
    if scaled := [name for name, value in config.to_dict().items() if "layer_idx" in name and value]:
        raise ModelError(f"{model.name}: {scaled[0]} makes each layer depend on its number, so that none can go.")
    every = {n: v for n, v in config.to_dict().items() if "token_id" not in n and isinstance(v, list | tuple)}
    per_layer = {n for n, values in every.items() if len(values) == count} - _fixed(config, count)
    lists = {n: values for n, values in every.items() if n in per_layer or _are_numbers(n, values, count)}
    names, settings = tuple(layer.name for layer in model.layers), base.settings_of(model)
    needed, why = _needed(config, count, count - left), "no setting has that number"
    for place in sorted(base.candidates(model, count), key=lambda place: "layer" not in place[-1]):
        allowed = list[int]()
        for number in (number for number in range(count) if number not in needed):
            one = Shortening(names, 1, place, lists, removed=[number])
            wrong = one.why_not(model.model, one.configured(settings))
            why = wrong or why
            allowed += [number] if wrong is None else []
        if len(allowed) >= count - left:
            return Shortening(names, count - left, place, lists, tuple(allowed))
    raise ModelError(
        f"{model.name}: {count - left} of its {count} decoder layers cannot go, for no configuration has the others "
        f"alone ({why}). Pattern 'channels' makes every layer narrower."
    )


def _needed(config: PretrainedConfig, count: int, going: int) -> list[int]:
    """Return the last layer in which transformers' cache counts tokens, if all such could be among those `going`.

    Linear attention counts none: a hybrid model without another layer cannot generate.
    """
    layers = enumerate(DynamicCache(config=config).layers)
    counting = [number for number, layer in layers if isinstance(layer, CacheLayerMixin)]
    return counting[-1:] if going >= len(counting) < count else []


def _require_residual(model: HuggingFaceModel) -> None:
    """Check that layers do nothing once their parameters are zero: then removal and zeros are alike."""

    def does_nothing(layer: DecoderLayer, call: Call, hidden: Tensor) -> bool:
        held = {name: parameter.clone() for name, parameter in layer.module.named_parameters()}
        for parameter in layer.module.parameters():
            parameter.zero_()
        output = call(layer.module, hidden)
        for name, parameter in layer.module.named_parameters():
            parameter.copy_(held[name])
        return torch.equal(output, hidden)

    with torch.no_grad():
        found = of_each_kind(model, does_nothing)
    if not all(found):
        raise ModelError(
            f"{model.name}: {model.layers[found.index(False)].name} with zeros in place of all its parameters does not "
            "hand on what it gets, so that a model without it would be another. Pattern 'channels' makes it narrower."
        )


def _fixed(config: PretrainedConfig, count: int) -> set[str]:
    """Return the lists that have `count` entries in a default model with another number of layers: two limits, say."""
    try:
        default = type(config)()
    except base.REFUSALS:
        return set()
    other = getattr(default, "num_hidden_layers", count) != count
    return {name for name, v in default.to_dict().items() if other and isinstance(v, list | tuple) and len(v) == count}


def _are_numbers(name: str, values: Sequence[Any], count: int) -> bool:
    """Return True if a setting lists some of `count` layers by number, without repeats: `mlp_only_layers`, say."""
    numbers = all(type(value) is int and 0 <= value < count for value in values)
    return "layer" in name and numbers and len(set(values)) == len(values)


def _said_of(layer: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Return the attributes of a layer's modules beside the layer's number: the kind of attention, say."""
    plain = (int, float, bool, str, type(None))
    return [
        (name, {n: v for n, v in vars(m).items() if type(v) in plain and n not in OWN and n[0] != "_"})
        for name, m in layer.named_modules()
    ]
