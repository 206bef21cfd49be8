"""The signature, checks and descriptions of a function and its command, made from settings."""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from convexprune._schema.group import Hint, Settings, checked
from convexprune._schema.settings import GROUPS
from convexprune.errors import RecipeError, unknown

UNSET: Any = inspect.Parameter.empty
"""Of an argument that was left out: the schema, or a recipe, has its default."""
RECIPE = {name: info for group in GROUPS for name, info in group.model_fields.items()}
PLACE = "settings: by name:\n    {settings}"
"""What a docstring has where its settings are to stand."""
LISTED = BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)
"""Of a setting that may be a text with commas."""


def _texts(given: Any) -> Any:
    texts = [given] if isinstance(given, str | Path) else given
    return [str(each) for each in texts] if isinstance(texts, Iterable) else texts


def _counts(given: Any) -> Any:
    counts = [given] if isinstance(given, str) else given
    return ",".join(counts).split(",") if isinstance(counts, list) and {*map(type, counts)} == {str} else counts


TEXTS = BeforeValidator(_texts)
"""Of texts that may be a single one, or paths."""
COUNTS = BeforeValidator(_counts)
"""Of numbers that may be a text with commas, or an option that is repeated."""
Own = TypeVar("Own", bound=Settings)
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Parameters(Generic[Own]):
    own: type[Own]  # the group of settings outside the recipe
    shared: tuple[str, ...]  # names of settings of the recipe
    defaults: Mapping[str, Any] = field(default_factory=dict)  # defaults that differ from the recipe's

    @cached_property
    def fields(self) -> dict[str, FieldInfo]:
        shared = {name: RECIPE[name] for name in self.shared}
        for name, default in self.defaults.items():
            shared[name] = info = shared[name]._copy()
            info.default = default
            info.description = (info.description or "").partition(" Left out:")[0]  # is what the recipe takes
        return shared | dict(self.own.model_fields)

    def group_of(self, name: str) -> str:
        kinds = [kind for kind in reversed(self.own.__mro__) if issubclass(kind, Settings)]
        return next(kind.group for kind in (*kinds, *GROUPS) if name in kind.model_fields)

    def hint(self, name: str) -> Hint:
        """Return the hint of a setting, with the choices that its type tells."""
        info: Any = self.fields[name]
        kinds = get_args(info.annotation) if get_origin(info.annotation) in (Union, UnionType) else (info.annotation,)
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
        hint: Hint = info.json_schema_extra["hint"]
        return hint if choices is None else hint._replace(choices=choices)

    def _by_their_names(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Replace aliases such as `nsamples` by the names of settings."""
        others = {option[2:].replace("-", "_"): name for name in self.fields for option in self.hint(name).options}
        settings = dict(given)
        for other in [name for name in given if name in others and name not in self.fields]:
            if settings.get(others[other]) is not None:
                raise RecipeError(f"{other} is another name of {others[other]}. Leave one of them out.")
            settings[others[other]] = settings.pop(other)
        return settings

    def read(self, given: Mapping[str, Any]) -> tuple[Own, dict[str, Any]]:
        settings = self._by_their_names({name: v for name, v in given.items() if v is not UNSET})
        for name in settings:
            if name not in self.fields:
                raise RecipeError(unknown("setting", name, self.fields))
        own = {name: value for name, value in settings.items() if name in self.own.model_fields}
        shared = {name: value for name, value in settings.items() if name not in own}
        return checked(self.own, own), {**self.defaults, **shared}


def documented(settings: Parameters[Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a function with `**settings` a signature, and a docstring with their descriptions in place of `PLACE`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        plain = inspect.signature(function)
        parameters = dict(plain.parameters)
        del parameters["settings"]
        for name, info in settings.fields.items():
            default = None if info.default is PydanticUndefined else info.default
            setting = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=info.annotation)
            parameters[name] = parameters.get(name, setting).replace(default=default)
        function.__dict__["__signature__"] = plain.replace(parameters=list(parameters.values()))
        words = inspect.cleandoc(function.__doc__ or "")  # as Python has it from 3.13 on
        function.__doc__ = words.replace(PLACE, _described(settings, words))
        return function

    return decorate


def _described(settings: Parameters[Any], words: str) -> str:
    indent = " " * 4
    whole: Any = {"break_on_hyphens": False, "break_long_words": False}
    lines = [
        textwrap.fill(
            f"{name}: {info.description}", 108, initial_indent=indent, subsequent_indent=indent + "    ", **whole
        )
        for name, info in settings.fields.items()
        if f"\n    {name}: " not in words
    ]
    return "\n".join(lines).lstrip()
