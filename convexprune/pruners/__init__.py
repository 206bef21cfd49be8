"""Pruners by name. To add a pruner: a file here and a line in `PRUNERS`."""

from convexprune.pruners._admm import ADMM
from convexprune.pruners._base import AbstractPruner, Damping, LayerEdit, LayerProblem, Score, unchanged
from convexprune.pruners._baselines.alps import ALPS
from convexprune.pruners._baselines.fistapruner import FISTAPruner
from convexprune.pruners._baselines.osscar import OSSCAR
from convexprune.pruners._baselines.scores import REAP, Magnitude, ShortGPT, Wanda, WandaSP
from convexprune.pruners._baselines.sparsegpt import SparseGPT
from convexprune.pruners._convex import Convex
from convexprune.pruners._cost import Cost
from convexprune.pruners._damped import choose_damping, damped
from convexprune.pruners._refit import Refitted, refitted

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

__all__ = [
    "ADMM", "ALPS", "METHODS", "OSSCAR", "PRUNERS", "REAP", "AbstractPruner", "Convex", "Damping", "FISTAPruner",
    "LayerEdit", "LayerProblem", "Magnitude", "Refitted", "Score", "ShortGPT", "SparseGPT", "Wanda", "WandaSP",
]  # fmt: skip
