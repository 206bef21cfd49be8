"""The names of patterns that users know; what they are is in `convexprune.constraints`."""

import warnings
from typing import Any

from convexprune.constraints import Constraint, SemiStructured, Unstructured, parse_pattern

__all__ = ["SemiStructured", "Unstructured", "parse_pattern"]


def __getattr__(name: str) -> Any:
    if name == "AbstractPattern":
        warnings.warn("AbstractPattern is convexprune.constraints.Constraint now.", DeprecationWarning, stacklevel=2)
        return Constraint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
