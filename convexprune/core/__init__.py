"""The mathematics of a layer: quadratic, penalties, problem, certificate, and bounds on any pruning."""

from convexprune.core._bound import LowerBound, PruningBound
from convexprune.core._certificate import Certificate, certify
from convexprune.core._concave import MCP, SCAD
from convexprune.core._elastic_net import ElasticNet
from convexprune.core._group_lasso import GroupLasso, RowGroups
from convexprune.core._moments import ErrorMoments, Moments, burstiness, sampling_noise
from convexprune.core._nuclear import Blocks, NuclearNorm
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.core._reverse_huber import ReverseHuber
from convexprune.core._side_by_side import SideBySide
from convexprune.core._symmetric import cholesky, definite_factor, definite_inverse, ridged, upper_factor
from convexprune.core._total_variation import TotalVariation

__all__ = [
    "L1", "MCP", "SCAD", "AbstractPenalty", "Blocks", "Certificate", "ElasticNet", "GroupLasso", "Moments",
    "NuclearNorm", "Problem", "Quadratic", "ReverseHuber", "RowGroups", "Support", "TotalVariation", "certify",
]  # fmt: skip
