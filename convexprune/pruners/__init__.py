"""Pruners by name. To add one: a file here and a line in `PRUNERS`."""

from convexprune.pruners.admm import ADMM
from convexprune.pruners.alps import ALPS
from convexprune.pruners.base import AbstractPruner, Pruned, PruningProblem
from convexprune.pruners.convex import Convex
from convexprune.pruners.fistapruner import FISTAPruner
from convexprune.pruners.magnitude import Magnitude
from convexprune.pruners.perspective import Perspective
from convexprune.pruners.refit import Refitted
from convexprune.pruners.sparsegpt import SparseGPT
from convexprune.pruners.wanda import Wanda

PRUNERS: dict[str, type[AbstractPruner]] = {
    "admm": ADMM,
    "alps": ALPS,
    "convex": Convex,
    "fistapruner": FISTAPruner,
    "magnitude": Magnitude,
    "perspective": Perspective,
    "sparsegpt": SparseGPT,
    "wanda": Wanda,
}

__all__ = [
    "ADMM",
    "ALPS",
    "PRUNERS",
    "AbstractPruner",
    "Convex",
    "FISTAPruner",
    "Magnitude",
    "Perspective",
    "Pruned",
    "PruningProblem",
    "Refitted",
    "SparseGPT",
    "Wanda",
]
