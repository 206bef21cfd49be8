"""The damped problem, in the coordinates of Optimal Brain Surgeon."""

import torch
from torch import Tensor

from convexprune.core import Quadratic
from convexprune.core._damping import EIGENVALUE_KNEE, Damping
from convexprune.core._factor import cholesky
from convexprune.core._moments import sampling_noise
from convexprune.errors import PruningError
from convexprune.pruners._base import LayerProblem

DEFAULT_DAMPING = 0.06
"""The damping for a single sample, which has nothing to be compared with."""
DOMAIN_SHIFT_RANGE, NOISE_GAIN = (0.05, 0.1), 12
"""What the part of the damping that saturates has for other texts: times the noise, within these limits."""
RIDGE = 0.003
"""The part that does not, for directions in which there is next to no energy."""


def choose_damping(problem: LayerProblem, damping: float | None) -> Damping:
    """The damping of a problem.

    An exact solver fits the noise of the tokens: directions in which the sample has little energy have more in other
    texts. Half against half, an eigenvalue below the knee is too small by about the same factor whatever its size, and
    by more the more noise there is. A saturating pull makes up for that, a ridge does not (lab/tried.md has others).
    What it has beside the noise is for texts of another kind, which differ however long the sample is.

    Args:
        damping: the strength of a ridge; None is what the sample's noise asks for.
    """
    if damping is not None:
        return Damping(damping)
    if not problem.folds:
        return Damping(DEFAULT_DAMPING)
    noise, (least, most) = sampling_noise(problem.folds), DOMAIN_SHIFT_RANGE
    return Damping(RIDGE, noise + min(max(NOISE_GAIN * noise, least), most))


def damped(problem: LayerProblem, damping: Damping) -> Quadratic:
    """The reconstruction error plus the damping, a quadratic about the dense weight; nothing pulls at dead inputs.

    Returns:
        The quadratic of V [m n].
    """
    quadratic, scale = problem.quadratic, problem.quadratic.scale()
    if damping.strength == 0:
        return quadratic
    if not damping.saturating:
        return quadratic + Quadratic.damping(problem.weight, damping.ridge * problem.scale.square())
    shifted = quadratic.gram / scale / scale[:, None]
    shifted.diagonal().add_(EIGENVALUE_KNEE)
    pull = _inverse(shifted, problem, damping).mul_(-damping.saturating * EIGENVALUE_KNEE)
    pull.diagonal().add_(damping.strength)
    zero = torch.zeros_like(problem.weight)
    pull = pull.mul_(torch.outer(problem.scale, problem.scale))
    return quadratic + Quadratic(pull, zero, zero[:, 0], problem.weight, checked=False)


def saliency_coordinates(problem: LayerProblem, damping: Damping) -> tuple[Quadratic, Tensor]:
    """The damped quadratic in coordinates U = V * scale where [H^-1]_jj is constant.

    There |U_ij| is the saliency of Optimal Brain Surgeon, |V_ij| / sqrt([H^-1]_jj): the square root of the error that
    removing the entry costs once all others have adapted. The scale is that of a unit diagonal, sqrt(H_jj), times
    factors with a mean square of 1, so that a stiffness means the same for every operator.

    Returns:
        The quadratic of U [m n], and the scale [n].
    """
    quadratic = damped(problem, damping).scaled(problem.scale)
    metric = _inverse(quadratic.gram, problem, damping).diagonal().rsqrt()
    metric = metric / metric.square().mean().sqrt()
    return quadratic.scaled(metric), problem.scale * metric


def _inverse(gram: Tensor, problem: LayerProblem, damping: Damping) -> Tensor:
    factor = cholesky(gram)
    if factor is None:
        raise PruningError(
            f"The Gram matrix is not positive definite with damping {damping.strength:.3g}: raise the damping, or "
            f"calibrate on more tokens than the {problem.moments.tokens} seen."
        )
    return torch.cholesky_inverse(factor)
