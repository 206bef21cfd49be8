"""REAP: remove the experts that add least on their tokens, without further changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, Score


@dataclass(frozen=True)
class REAP(AbstractPruner):
    """Router-weighted activations choose experts; remaining weights do not change (Lasby et al., arXiv 2510.13999).

    The score of an expert is the mean of g |f(x)| over its tokens x, with g the router's weight and f the expert's
    output. Difference to the authors' code (CerebrasResearch/reap): g is the weight that the model uses. Theirs is not
    normalized where a configuration has no `norm_topk_prob` (Mixtral).
    """

    whole_only = "experts"
    scores: ClassVar[Mapping[str, Score]] = {"experts": "reap"}

    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`: the dense weight."""
        return LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))
