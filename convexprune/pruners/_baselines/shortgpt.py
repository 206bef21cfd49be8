"""ShortGPT: the decoder layers that turn the hidden states least are removed, and nothing else changes."""

from dataclasses import dataclass

import torch

from convexprune.constraints import Constraint
from convexprune.errors import PatternError
from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem


@dataclass(frozen=True)
class ShortGPT(AbstractPruner):
    """Block influence chooses decoder layers; weights of the others do not change (Men et al., arXiv 2403.03853).

    The score of a layer is 1 - mean cos(h, h'), of the hidden states that enter and leave it.
    """

    layer_score = "influence"

    def require(self, pattern: Constraint) -> None:
        """See `AbstractPruner.require`.

        Raises:
            PatternError: the pattern is not of whole decoder layers.
        """
        if pattern.removes != "layers":
            raise PatternError(f"ShortGPT removes decoder layers, and pattern {pattern} does not. Take 'layers'.")

    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`: the dense weight."""
        return LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))
