"""Pruners by name. To add a pruner: a file here and a line in `PRUNERS`."""

import warnings
from collections.abc import Iterable
from typing import Any

from convexprune.errors import unknown
from convexprune.pruners._admm import ADMM
from convexprune.pruners._base import AbstractPruner, Damping, LayerEdit, LayerProblem, Score
from convexprune.pruners._baselines.alps import ALPS
from convexprune.pruners._baselines.fistapruner import FISTAPruner
from convexprune.pruners._baselines.osscar import OSSCAR
from convexprune.pruners._baselines.scores import REAP, Magnitude, ShortGPT, Wanda, WandaSP
from convexprune.pruners._baselines.sparsegpt import SparseGPT
from convexprune.pruners._convex import Convex
from convexprune.pruners._refit import Refitted

PRUNERS: dict[str, type[AbstractPruner]] = {
    "admm": ADMM,
    "alps": ALPS,
    "convex": Convex,
    "fistapruner": FISTAPruner,
    "magnitude": Magnitude,
    "sparsegpt": SparseGPT,
    "wanda": Wanda,
}
"""Those that take any choice of entries."""

METHODS: dict[str, type[AbstractPruner]] = PRUNERS | {
    "osscar": OSSCAR,
    "reap": REAP,
    "shortgpt": ShortGPT,
    "wanda-sp": WandaSP,
}
"""All of them, with those that take whole columns, decoder layers or experts only."""

GONE = {
    "perspective": "The method 'perspective' is gone: 'convex' and 'admm' have lower errors and take less time. "
    "Its relaxation is still the lower bound of reports (`LowerBound`).",
}


def no_method(name: str, others: Iterable[str] = ()) -> str:
    """Return the message for an unknown method.

    Args:
        name: the unknown name.
        others: further accepted names.

    Returns:
        The text.
    """
    return GONE.get(name) or unknown("method", name, {*METHODS, *others})


__all__ = [
    "ADMM", "ALPS", "METHODS", "OSSCAR", "PRUNERS", "REAP", "AbstractPruner", "Convex", "Damping", "FISTAPruner",
    "LayerEdit", "LayerProblem", "Magnitude", "Refitted", "Score", "ShortGPT", "SparseGPT", "Wanda", "WandaSP",
    "no_method",
]  # fmt: skip

_RENAMED = {"PruningProblem": LayerProblem, "Pruned": LayerEdit}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        renamed = _RENAMED[name]
        warnings.warn(f"{name} is {renamed.__name__} now.", DeprecationWarning, stacklevel=2)
        return renamed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
