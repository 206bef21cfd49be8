"""The mathematics of a layer: quadratic, penalties, problem, certificate, and bounds on any pruning."""

from convexprune.core._group_lasso import GroupLasso
from convexprune.core._moments import Moments
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Certificate, Problem, certify
from convexprune.core._quadratic import Quadratic
from convexprune.core._reverse_huber import ReverseHuber

__all__ = [
    "L1", "AbstractPenalty", "Certificate", "GroupLasso", "Moments", "Problem", "Quadratic", "ReverseHuber", "Support",
    "certify",
]  # fmt: skip
