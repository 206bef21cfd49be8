"""The damped problem, in the coordinates of Optimal Brain Surgeon."""

import torch
from torch import Tensor

from convexprune.errors import PruningError
from convexprune.moments import sampling_noise
from convexprune.pruners.base import PruningProblem
from convexprune.quadratic import Quadratic

UNKNOWN = 0.06
"""The damping for a single sample, which has nothing to be compared with."""


def choose_damping(problem: PruningProblem, damping: float | None, least: float) -> float:
    """`damping`, or if it is None what the noise of the calibration sample asks for, at least `least`.

    With s = noise / (1 - noise), the ridge that shrinking the correlations by `noise` amounts to, it is
    s min(1, 4 s): all of s only where a quarter of the correlations is noise. Without damping an exact solver fits the
    noise of the tokens; with all of s it gives away more than that where there are many tokens (docs/benchmarks.md).
    """
    if damping is not None:
        return damping
    if not problem.folds:
        return UNKNOWN
    noise = sampling_noise(problem.folds)
    share = noise / (1 - noise)
    return max(least, share * min(1.0, 4 * share))


def damped(problem: PruningProblem, damping: float) -> Quadratic:
    """The reconstruction error plus  damping/2 sum_ij H_jj (V_ij - W_ij)^2."""
    if damping == 0:
        return problem.quadratic
    return problem.quadratic + Quadratic.damping(problem.weight, damping * problem.scale.square())


def saliency_coordinates(problem: PruningProblem, damping: float) -> tuple[Quadratic, Tensor]:
    """The damped quadratic of U = V * scale in which [H^-1]_jj is constant, and that scale [n].

    There |U_ij| is the saliency of Optimal Brain Surgeon, |V_ij| / sqrt([H^-1]_jj): the square root of the error that
    removing the entry costs once all others have adapted. The scale is that of a unit diagonal, sqrt(H_jj), times
    factors with a mean square of 1, so that a stiffness means the same for every operator.

    Raises:
        PruningError: the damped Gram matrix is not positive definite.
    """
    quadratic = damped(problem, damping).scaled(problem.scale)
    factor, info = torch.linalg.cholesky_ex(quadratic.gram)
    if int(info):
        raise PruningError(
            f"The Gram matrix is not positive definite with damping {damping}: raise the damping, or calibrate on more "
            f"tokens than the {problem.moments.tokens} seen."
        )
    metric = torch.cholesky_inverse(factor).diagonal().rsqrt()
    metric = metric / metric.square().mean().sqrt()
    return quadratic.scaled(metric), problem.scale * metric
