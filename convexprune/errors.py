"""Every error that convexprune raises on purpose.

    ConvexpruneError
    ├── ProblemError      (ValueError)   tensors that do not make a problem: shapes, dtypes, negative strengths
    ├── PatternError      (ValueError)   a sparsity or a pattern that does not exist or does not fit
    ├── RecipeError       (ValueError)   a setting that is unknown or out of range
    ├── UnsupportedError  (TypeError)    a solver was given a penalty that it cannot take
    ├── DependencyError   (ImportError)  an optional package is missing; has the pip command
    ├── CalibrationError  (ValueError)   a data set that cannot calibrate this model
    ├── ModelError        (ValueError)   a model that cannot be pruned: quantized, non-finite, unreadable, ...
    ├── OutputError       (OSError)      an output folder that cannot be written without losing something
    └── PruningError      (RuntimeError) a result that breaks the request: wrong sparsity, non-finite values

A message says what came, what is accepted and what to do. A solve that did not converge is not an error: the `Solution`
and the report have a `Status`.
"""

import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import requires


class ConvexpruneError(Exception):
    """Base of all errors raised on purpose."""


class ProblemError(ConvexpruneError, ValueError):
    """The tensors given do not make a problem."""


class PatternError(ConvexpruneError, ValueError):
    """The sparsity or the pattern does not exist or does not fit the weight."""


class RecipeError(ConvexpruneError, ValueError):
    """A setting is unknown or out of range."""


class UnsupportedError(ConvexpruneError, TypeError):
    """The solver cannot take the penalty."""


class DependencyError(ConvexpruneError, ImportError):
    """An optional package is missing."""


class CalibrationError(ConvexpruneError, ValueError):
    """The data set cannot calibrate the model."""


class ModelError(ConvexpruneError, ValueError):
    """The model cannot be pruned."""


class OutputError(ConvexpruneError, OSError):
    """The output folder cannot be written without losing something."""


class PruningError(ConvexpruneError, RuntimeError):
    """The result breaks the request."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the message for an unknown name: the name, similar names, all names.

    Args:
        kind: noun for the named thing.
        name: the unknown name.
        known: all names.

    Returns:
        The text.
    """
    names = {each.casefold(): each for each in sorted(known)}
    near = get_close_matches(str(name).casefold(), names, n=1)
    guess = f" Did you mean {names[near[0]]!r}?" if near else ""
    return f"Unknown {kind} {shown(name)}.{guess} Known: {', '.join(names.values()) or 'none'}."


def shown(value: object) -> str:
    """Return a `value` for a message: a single short line."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no number of so many digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def install_hint(extra: str) -> str:
    """Return the pip command for the packages of an `extra`, independent of the origin of convexprune."""
    of_extra = re.compile(rf"""([^;]+?)\s*;.*\bextra == ['"]{extra}['"]""")
    packages = [match[1] for match in map(of_extra.match, requires("convexprune") or []) if match]
    return f"pip install {shlex.join(packages)}"
