"""Remove channels, or heads, for good: sets whose number is a setting of the model, equal in all layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from convexprune.constraints import Columns, Constraint
from convexprune.errors import ModelError

from .._channels.channels import Channels
from .._channels.inner_channels import inner_channels
from .._huggingface import HuggingFaceModel
from . import base


@dataclass(frozen=True, eq=False)
class Narrowing(base.AbstractRemoval):
    """The removal of channels, or KV groups of heads; `removed` are their numbers by operator that reads them."""

    sets: tuple[Channels, ...]  # named after the operator whose inputs they are
    places: Mapping[base.Place, tuple[int, int]]  # numbers before and after, by the setting that declares them
    said: Mapping[base.Place, int] = field(default_factory=dict)  # settings that must not follow from these

    @property
    def patterns(self) -> Mapping[str, Columns]:
        return {
            one.name: Columns(self.count(one.size) / one.size, block=axis.block)
            for one in self.sets
            for axis in one.consumers
        }

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        return {".".join(path): pair for path, pair in self.places.items()}

    def choose(self, model: HuggingFaceModel) -> tuple[str, ...]:
        names = {one.name for one in self.sets}
        inside = {o.name: None for y in model.layers for o in y.operators if f"{y.name}.{o.name}" in names}
        model.choose(tuple(inside), because="it reads nothing that is removed")
        return tuple(inside)

    def narrowed(self, read: Callable[[str], Tensor]) -> Self:
        removed = dict[str, list[int]]()
        for one in self.sets:
            (axis,) = one.consumers
            unused = (axis.of(read(axis.parameter)) == 0).all(1 - axis.dim).view(-1, axis.block).all(1)
            removed[one.name] = unused.nonzero().flatten().tolist()[: self.count(one.size)]
        return self.without(removed)

    def without(self, removed: Mapping[str, Sequence[int]]) -> Self:
        for one in self.sets:
            found, count = set(removed.get(one.name, ())), self.count(one.size)
            if len(found) != count or not found <= set(range(one.size)):
                raise ModelError(f"{one.name}: {len(found)} of {one.size} to remove; it should be {count}.")
        return replace(self, removed={one.name: sorted(removed[one.name]) for one in self.sets})

    def without_first(self) -> Self:
        """Return the removal of the first channels of every set: all removals leave the same shapes."""
        return self.without({one.name: range(self.count(one.size)) for one in self.sets})

    def configured(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return base.with_values(settings, {**self.said, **{path: after for path, (_, after) in self.places.items()}})

    def count(self, size: int) -> int:
        return next(before - after for before, after in self.places.values() if before == size)

    @cached_property
    def cuts(self) -> dict[str, base.Cut]:
        gone: dict[str, dict[tuple[int, int | None], list[int]]] = {}
        readers = {axis.parameter for one in self.sets for axis in one.consumers}
        for one in self.sets:
            for axis in (*one.axes, *one.consumers):
                own = gone.setdefault(axis.parameter, {}).setdefault((axis.dim, axis.index), [])
                own += axis.entries(self.removed[one.name])
        found = dict[str, base.Cut]()
        for name, each in gone.items():
            (dim, *others) = {dim for dim, _ in each}
            if others:
                raise ModelError(f"{name}: channels are rows and columns of it.")
            numbers = {index: tuple(entries) for (_, index), entries in each.items()}
            found[name] = base.Cut(dim, numbers, name in readers)
        return found


def find_narrowing(model: HuggingFaceModel, pattern: Constraint) -> Narrowing:
    """Find the channels of a dense model that a pattern removes: inside MLPs and experts, by experiment.

    The setting with their number is found by its value, and tried: the model is built without memory with a new value,
    and exactly the parameters of the channels have to shrink.
    """
    whole = [one for one in inner_channels(model) if len(one.consumers) == 1 and "[" not in one.name]
    if not whole:
        raise ModelError(f"{model.name}: no channels between two operators are to be found that could be removed.")
    settings, shapes = base.settings_of(model), base.parameter_shapes(model.model)
    places, sets = dict[base.Place, tuple[int, int]](), list[Channels]()
    for size in dict.fromkeys(one.size for one in whole):
        pattern.check(1, size)
        for path in base.candidates(model, size):
            pair = size, pattern.width(size)
            found = _said_by(model.model, settings, {path: pair}, [one for one in whole if one.size == size], shapes)
            if found:
                places[path] = pair
                sets += found
                break
    if not sets:
        sizes = ", ".join(str(size) for size in dict.fromkeys(one.size for one in whole))
        raise ModelError(
            f"{model.name}: no setting of its configuration says how many channels its MLP has ({sizes}), so that a "
            "model with fewer cannot be written. Pattern 'columns' zeroes them in place."
        )
    found = Narrowing(tuple(sets), places)
    found.without_first().require_configured(model, found.configured(settings))
    return found


def _said_by(
    model: PreTrainedModel,
    settings: Mapping[str, Any],
    places: Mapping[base.Place, tuple[int, int]],
    sets: Sequence[Channels],
    shapes: base.Shapes,
) -> list[Channels]:
    """Return the sets whose size these settings declare; empty if the settings declare anything else as well."""
    built = base.shapes_of(model, Narrowing((), places).configured(settings))
    changed = {name for name, shape in built.items() if shape != shapes.get(name)}
    found = [one for one in sets if one.consumers[0].parameter in changed]
    try:
        return found if built == Narrowing(tuple(found), places).without_first().shapes(shapes) else []
    except ModelError:
        return []
