"""ShortGPT: the decoder layers that turn the hidden states least are removed, and nothing else changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, Score


@dataclass(frozen=True)
class ShortGPT(AbstractPruner):
    """Block influence chooses decoder layers; remaining weights do not change (Men et al., arXiv 2403.03853).

    The score of a layer is 1 - mean cos(h, h'), of the hidden states that enter and leave the layer; those that
    leave the last layer are taken after the final norm (icip-cas/ShortGPT, shortgpt.py).
    """

    whole_only = "layers"
    scores: ClassVar[Mapping[str, Score]] = {"layers": "influence"}

    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`: the dense weight."""
        return LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))
