"""Change a number in a model's configuration: the settings that may declare a size, and the resulting shapes."""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from convexprune.errors import ModelError

from .._checkpoints.model_folder import CONFIG
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


def settings_of(model: HuggingFaceModel) -> dict[str, Any]:
    if model.shards is None:
        return model.model.config.to_dict()
    return json.loads((model.shards.folder / CONFIG).read_bytes())


def candidates(config: PretrainedConfig, size: int) -> Iterator[Place]:
    """Yield settings that may declare a size: first settings with its value, then settings left to the model."""
    text = config.get_text_config()
    inside = () if text is config else tuple(name for name, value in vars(config).items() if value is text)[:1]
    values = text.to_dict()
    yield from ((*inside, name) for name, value in values.items() if type(value) is int and value == size)
    yield from (
        (*inside, name) for name, value in values.items() if value is None and any(part in name for part in UNSET)
    )


def set_at(settings: dict[str, Any], place: Place, value: Any) -> None:
    *inside, name = place
    for each in inside:
        settings = settings.setdefault(each, {})
    settings[name] = value


def built(model: PreTrainedModel, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model of the same class with new settings and parameters without memory."""
    with parameters_on_meta():
        return type(model)(type(model.config).from_dict(deepcopy(dict(settings))))


def shapes_of(model: PreTrainedModel, settings: Mapping[str, Any]) -> Shapes:
    """Return the parameters' shapes of a model with new settings; none if there is no such model."""
    try:
        return {name: tuple(p.shape) for name, p in built(model, settings).named_parameters()}
    except REFUSALS:
        return {}


def require_shapes(model: PreTrainedModel, settings: Mapping[str, Any], expected: Shapes) -> None:
    """Check that a model with new settings has the expected parameters."""
    if (found := shapes_of(model, settings)) == expected:
        return
    name = next(n for n in (*expected, *found) if found.get(n) != expected.get(n))
    here, there = (list(s[name]) if name in s else "not there" for s in (expected, found))
    raise ModelError(
        f"The configuration of a {type(model).__name__} cannot say what is removed and no more: in the model that it "
        f"then describes {name} is {there}; it should be {here}."
    )
