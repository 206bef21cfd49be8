"""The damping of a layer problem: how a solution is pulled towards the dense weight."""

from dataclasses import dataclass

EIGENVALUE_KNEE = 0.1
"""Eigenvalues of the correlations, 1 in the mean, below which the sample's are too small by much the same factor."""


@dataclass(frozen=True)
class Damping:
    """A pull towards the dense weight,  1/2 sum_i (V - W)_i (S (ridge I + saturating P) S + prior I) (V - W)_i'.

    S = sqrt(diag H). P = I - k (C + k I)^-1, with the correlations C = S^-1 H S^-1 and k = `EIGENVALUE_KNEE`, is small
    in directions where the sample has little energy. The prior is on energies: it pulls at a rare input as if the
    input had that much more energy.

    Args:
        saturating: the pull in directions of much energy, beside the ridge.
        prior: in units of H.
    """

    ridge: float
    saturating: float = 0.0
    prior: float = 0.0

    @property
    def strength(self) -> float:
        """The pull in directions of much energy, without the prior."""
        return self.ridge + self.saturating


NO_DAMPING = Damping(0.0)
