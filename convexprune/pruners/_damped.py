"""The damped problem, in the coordinates of Optimal Brain Surgeon."""

import torch
from torch import Tensor

from convexprune.core import Quadratic, burstiness, definite_inverse, sampling_noise
from convexprune.pruners._base import Damping, LayerProblem

EIGENVALUE_KNEE = 0.1
"""Eigenvalues of the correlations, 1 in the mean, below which the sample's are too small by much the same factor."""
DOMAIN_SHIFT = 0.25
"""The saturating part for texts of another kind, which differ however long the sample is."""
SHIFT_PER_BURSTINESS, MOST_LEVELLING = 0.02, 0.5
"""The variance of an input's log energy between kinds of text, over the burstiness; and the largest levelling."""
RIDGE_RANGE, RIDGE_GAIN = (0.003, 0.1), 0.12
"""The ridge, for directions without energy in the sample: times the inputs over the tokens, within these limits."""
RIDGE_PER_SHIFT, SHIFT_TOKENS = 60, 2**14
"""The ridge for texts of another kind, over the squared shift: the noise that is left of so many tokens."""
PRIOR_GAIN, PRIOR_TOKENS, LARGEST_PRIOR = 6, 4, 0.2
"""The prior, in units of a typical energy: times the cube of the noise, and that many over the tokens."""
LARGEST_NOISE = 0.5
"""The noise of a single sample, which has no halves, is as measured elsewhere: inputs over tokens, at most this."""
CODES_RIDGE, CODES_SATURATING = (4, 1.0), (25, 3.0)
"""For codes: the ridge over the shift and its limit, and the saturating part's likewise."""


def choose_damping(problem: LayerProblem, damping: float | None, codes: bool = False) -> Damping:
    """Return the damping that the noise of the tokens asks for, or a ridge of strength `damping`.

    An exact solver fits the noise. Half against half, an eigenvalue below the knee is too small by about the same
    factor whatever its size. A saturating pull makes up for that. A part of it is for texts of another kind. These
    change the energies of bursty inputs most, so the pull draws such energies to the typical one. The ridge is for
    directions, the prior for inputs, without energy in the sample (lab/tried.md has what else was tried).

    The correlations of other texts differ too, by a shift that the noise tells. More tokens lower the noise, but not
    the shift: it is the noise times the tokens, over `SHIFT_TOKENS`. The ridge grows with the square of the shift.
    Codes of a dense weight take more of the ridge and of the saturating part, and a shift no less than the noise.
    """
    if damping is not None:
        return Damping(damping)
    tokens = max(1, problem.moments.tokens)
    shortage = problem.weight.shape[1] / tokens
    noise = sampling_noise(problem.folds) if problem.folds else min(LARGEST_NOISE, shortage)
    shift = noise * tokens / SHIFT_TOKENS
    ridge = min(max(RIDGE_RANGE[0], RIDGE_GAIN * shortage, RIDGE_PER_SHIFT * shift**2), RIDGE_RANGE[1])
    prior = min(LARGEST_PRIOR, PRIOR_GAIN * noise**3 + PRIOR_TOKENS / tokens)
    saturating = noise + DOMAIN_SHIFT
    if codes:
        shift = max(shift, noise)
        ridge = max(ridge, min(CODES_RIDGE[0] * shift, CODES_RIDGE[1]))
        saturating = min(DOMAIN_SHIFT + CODES_SATURATING[0] * shift, CODES_SATURATING[1])
    return Damping(ridge, saturating, prior * problem.typical_energy, _levelling(problem))


def _levelling(problem: LayerProblem) -> float:
    """Return v / (v + s^2), of log energies: v is their variance between texts, s^2 that between inputs."""
    if not problem.folds or not problem.typical_energy:
        return 0.0
    shift = SHIFT_PER_BURSTINESS * burstiness(problem.folds)
    energies = problem.quadratic.gram.diagonal()[~problem.dead]
    spread = float((energies / problem.typical_energy).log().var(correction=0))
    return min(shift / (shift + spread), MOST_LEVELLING) if shift else 0.0


def damped(problem: LayerProblem, damping: Damping) -> Quadratic:
    """Return the reconstruction error plus the damping, about the dense weight; nothing pulls at dead inputs."""
    quadratic, scale = problem.quadratic, problem.quadratic.scale()
    if damping.strength == 0:
        return quadratic
    live, levelled = ~problem.dead, problem.scale
    if damping.levelling:
        ratios = (problem.typical_energy**0.5 / problem.scale) ** damping.levelling
        levelled = torch.where(live, problem.scale * ratios, 0)
    if not damping.saturating:
        strength = damping.ridge * levelled.square() + damping.prior * live
        return quadratic + Quadratic.damping(problem.weight, strength)
    shifted = quadratic.gram / scale / scale[:, None]
    shifted.diagonal().add_(EIGENVALUE_KNEE)
    pull = definite_inverse(shifted).mul_(-damping.saturating * EIGENVALUE_KNEE)
    pull.diagonal().add_(damping.strength)
    zero = torch.zeros_like(problem.weight)
    pull = pull.mul_(torch.outer(levelled, levelled))
    pull.diagonal().add_(live, alpha=damping.prior)
    return quadratic + Quadratic(pull, zero, zero[:, 0], problem.weight, checked=False)


def saliency_coordinates(problem: LayerProblem, damping: Damping) -> tuple[Quadratic, Tensor]:
    """Return the damped quadratic in coordinates U = V * scale where [H^-1]_jj is constant, and the scale [n].

    There |U_ij| is the saliency of Optimal Brain Surgeon, |V_ij| / sqrt([H^-1]_jj): the square root of the error that
    removing the entry costs once all others have adapted. The scale is that of a unit diagonal, sqrt(H_jj), times
    factors with a mean square of 1, so that a stiffness means the same for every operator.
    """
    quadratic = damped(problem, damping).scaled(problem.scale)
    metric = definite_inverse(quadratic.gram).diagonal().rsqrt()
    metric = metric / metric.square().mean().sqrt()
    return quadratic.scaled(metric), problem.scale * metric
