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
PRIOR_GAIN, PRIOR_TOKENS, LARGEST_PRIOR = 6, 4, 0.2
"""The prior, in units of a typical energy: times the cube of the noise, and that many over the tokens."""
LARGEST_NOISE = 0.5
"""The noise of a single sample, which has no halves, is as measured elsewhere: inputs over tokens, at most this."""


def choose_damping(problem: LayerProblem, damping: float | None) -> Damping:
    """Return the damping that the noise of the tokens asks for, or a ridge of strength `damping`.

    An exact solver fits the noise. Half against half, an eigenvalue below the knee is too small by about the same
    factor whatever its size. A saturating pull makes up for that. A part of it is for texts of another kind. There the
    energies of bursty inputs are others, so the pull levels them: the posterior mean of a log-normal energy. The ridge
    is for directions, the prior for inputs, without energy in the sample (lab/tried.md has what else was tried).
    """
    if damping is not None:
        return Damping(damping)
    tokens = max(1, problem.moments.tokens)
    shortage = problem.weight.shape[1] / tokens
    noise = sampling_noise(problem.folds) if problem.folds else min(LARGEST_NOISE, shortage)
    ridge = min(max(RIDGE_RANGE[0], RIDGE_GAIN * shortage), RIDGE_RANGE[1])
    prior = min(LARGEST_PRIOR, PRIOR_GAIN * noise**3 + PRIOR_TOKENS / tokens)
    return Damping(ridge, noise + DOMAIN_SHIFT, prior * problem.typical_energy, _levelling(problem))


def _levelling(problem: LayerProblem) -> float:
    """Return how far energies move between texts, over that and how far they differ between inputs: of their logs."""
    if not problem.folds or not problem.typical_energy:
        return 0.0
    shift = SHIFT_PER_BURSTINESS * burstiness(problem.folds)
    spread = float((problem.scale / problem.typical_energy**0.5)[~problem.dead].log().var(correction=0)) * 4
    return min(shift / (shift + spread), MOST_LEVELLING) if shift else 0.0


def damped(problem: LayerProblem, damping: Damping) -> Quadratic:
    """Return the reconstruction error plus the damping, about the dense weight; nothing pulls at dead inputs."""
    quadratic, scale = problem.quadratic, problem.quadratic.scale()
    if damping.strength == 0:
        return quadratic
    live = ~problem.dead
    if not damping.saturating:
        strength = damping.ridge * problem.scale.square() + damping.prior * live
        return quadratic + Quadratic.damping(problem.weight, strength)
    shifted = quadratic.gram / scale / scale[:, None]
    shifted.diagonal().add_(EIGENVALUE_KNEE)
    pull = definite_inverse(shifted).mul_(-damping.saturating * EIGENVALUE_KNEE)
    pull.diagonal().add_(damping.strength)
    zero, levelled = torch.zeros_like(problem.weight), problem.scale
    if damping.levelling:
        ratios = (problem.typical_energy**0.5 / problem.scale) ** damping.levelling
        levelled = torch.where(live, problem.scale * ratios, 0)
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
