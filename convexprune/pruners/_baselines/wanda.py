"""Wanda: keep the weights that carry the largest inputs."""

from dataclasses import dataclass

from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, dead_inputs_first, projected


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
        """See `AbstractPruner.prune`."""
        return projected(problem, problem.quadratic.gram.diagonal())
