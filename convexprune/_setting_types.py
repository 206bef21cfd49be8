"""Types of the settings of solvers and pruners: annotations, checked when the object is made."""

from dataclasses import fields
from functools import lru_cache
from inspect import signature
from typing import Annotated, Any, TypeVar, get_type_hints

import numpy as np
from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError

from convexprune.errors import RecipeError, unknown

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Ends = Annotated[tuple[Positive, Positive], Strict(False)]
"""Where something begins and where it ends (`between`); files of settings have a list for it."""

Made = TypeVar("Made")


def between(ends: tuple[float, float], share: float) -> float:
    """Return a point of a geometric path, its `share` in [0, 1]."""
    return ends[0] * (ends[1] / ends[0]) ** share


def make(kind: type[Made], name: str, settings: dict[str, Any]) -> Made:
    """An object of a dataclass of settings."""
    known = signature(kind).parameters
    for setting in settings:
        if setting not in known:
            raise RecipeError(unknown(f"setting of {name!r}:", setting, known))
    return kind(**settings)


def check_settings(made: object) -> None:
    """Check the fields of a dataclass against their annotations; numbers are finite, and NumPy's become Python's."""
    for name, accepted in _accepted(type(made)).items():
        if isinstance(value := getattr(made, name), np.generic):
            object.__setattr__(made, name, value := value.item())
        try:
            accepted.validate_python(value)
        except ValidationError as error:
            raise RecipeError(f"{type(made).__name__}: {name}={value!r}: {error.errors()[0]['msg']}.") from None


@lru_cache
def _accepted(kind: type) -> dict[str, TypeAdapter[Any]]:
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        hints = get_type_hints(kind, localns={"Count": Count}, include_extras=True)
    except NameError:  # of a user's own class whose annotations only a type checker resolves
        return {}
    return {field.name: TypeAdapter(hints[field.name], config=config) for field in fields(kind)}
