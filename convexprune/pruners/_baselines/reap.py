"""REAP: the experts that add least where they are chosen are removed, and nothing else changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, Score


@dataclass(frozen=True)
class REAP(AbstractPruner):
    """Router-weighted activations choose experts; weights of the others do not change (Lasby et al., arXiv 2510.13999).

    The score of an expert is the mean of g |f(x)| over the tokens x that are sent to it, with g the weight that the
    router gives it and f its output.
    """

    whole_only = "experts"
    scores: ClassVar[Mapping[str, Score]] = {"experts": "reap"}

    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`: the dense weight."""
        return LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))
