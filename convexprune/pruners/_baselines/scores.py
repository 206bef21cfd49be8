"""Published methods that score weights or parts of a model, and change no kept weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.pruners._base import (
    AbstractPruner,
    LayerEdit,
    LayerProblem,
    Score,
    dead_inputs_first,
    projected,
    unchanged,
)


@dataclass(frozen=True)
class Magnitude(AbstractPruner):
    """Score |W_ij|; kept weights do not change (Han et al. 2015, without the retraining).

    The result is the nearest weight in the pattern with equal entries. Inputs, dead inputs too, play no part.
    """

    def prune(self, problem: LayerProblem) -> LayerEdit:
        return projected(problem)


@dataclass(frozen=True)
class Wanda(AbstractPruner):
    """Score |W_ij| |X_j|_2; kept weights do not change (Sun et al., arXiv 2306.11695, Eq. 1; locuslab/wanda).

    Differences to the authors' code: |X_j|_2 is taken over all tokens at once; the quota is the pattern's (the paper
    prunes per output: ask for quota="row"); ties are exact; inputs come from the recipe's prefix, by default
    dense before the layer and pruned inside it: as published with prefix="pruned". It is the nearest weight in the
    pattern in the metric diag(H).
    """

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        return projected(problem, problem.quadratic.gram.diagonal())


@dataclass(frozen=True)
class WandaSP(AbstractPruner):
    """Score sum_i |W_ij| |X_j|_2 of column j; kept weights do not change (An et al., arXiv 2312.11983, section 4.1).

    Wanda for columns, as the nearest weight in the pattern, takes the root of the sum of squares, |W_:j|_2 |X_j|_2.
    FLAP's score is the square, with the variance of x_j in place of its mean square. For blocks of columns, such as
    heads, the scores of columns are added up, as in FLAP's code.
    """

    columns_only = True

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        self.require(problem.pattern)
        scores = problem.weight.abs() * problem.scale
        parts = [_added_up(scores[rows], own.block) for rows, own in problem.pattern.parts(len(scores))]
        mask = problem.pattern.mask(torch.cat(parts))
        return LayerEdit(problem.weight * mask, mask)


def _added_up(scores: Tensor, block: int) -> Tensor:
    """Add up an operator's scores [m n] over rows and over blocks of columns, in place of every score."""
    return scores.sum(0).view(-1, block).sum(1).repeat_interleave(block).expand_as(scores)


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
        return unchanged(problem)


@dataclass(frozen=True)
class ShortGPT(AbstractPruner):
    """Block influence chooses decoder layers; remaining weights do not change (Men et al., arXiv 2403.03853).

    The score of a layer is 1 - mean cos(h, h'), of the hidden states that enter and leave the layer; those that
    leave the last layer are taken after the final norm (icip-cas/ShortGPT, shortgpt.py).
    """

    whole_only = "layers"
    scores: ClassVar[Mapping[str, Score]] = {"layers": "influence"}

    def prune(self, problem: LayerProblem) -> LayerEdit:
        return unchanged(problem)
