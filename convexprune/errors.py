"""Every error that convexprune raises on purpose.

    ConvexpruneError
    ├── ProblemError      (ValueError)   tensors that do not make a problem: shapes, dtypes, negative strengths
    ├── PatternError      (ValueError)   a sparsity or a pattern that does not exist or does not fit
    ├── RecipeError       (ValueError)   a setting that is unknown or out of range
    ├── UnsupportedError  (TypeError)    a solver was given a penalty that it cannot take
    ├── DependencyError   (ImportError)  an optional package is missing; ends with the pip command
    ├── CalibrationError  (ValueError)   a data set that cannot calibrate this model
    ├── ModelError        (ValueError)   a model that cannot be pruned: quantised, non-finite, unreadable, ...
    ├── OutputError       (OSError)      an output folder that cannot be written without losing something
    └── PruningError      (RuntimeError) the result is not what was asked for: wrong sparsity, non-finite values

A message says what came, what is accepted and what to do. A solve that did not converge is not an error: it is a
`Status` in the `Solution` and in the report.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ConvexpruneError(Exception):
    """Base of all errors raised on purpose."""


class ProblemError(ConvexpruneError, ValueError):
    """The tensors given do not make a problem."""


class PatternError(ConvexpruneError, ValueError):
    """The sparsity or the pattern does not exist or does not fit the weight."""


class RecipeError(ConvexpruneError, ValueError):
    """A setting is unknown or out of range."""


class UnsupportedError(ConvexpruneError, TypeError):
    """The solver cannot take this penalty."""


class DependencyError(ConvexpruneError, ImportError):
    """An optional package is missing."""


class CalibrationError(ConvexpruneError, ValueError):
    """The data set cannot calibrate this model."""


class ModelError(ConvexpruneError, ValueError):
    """The model cannot be pruned."""


class OutputError(ConvexpruneError, OSError):
    """The output folder cannot be written without losing something."""


class PruningError(ConvexpruneError, RuntimeError):
    """The result is not what was asked for."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not known: what came, what is near, what there is."""
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {name!r}.{guess} Known: {', '.join(names)}."
