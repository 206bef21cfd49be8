"""The duality gap of a row priced on its kept entries: for H that is singular, but not on the kept entries."""

from math import inf

import torch
from torch import Tensor

from convexprune.core._abstract_penalty import AbstractPenalty, Elementwise
from convexprune.core._quadratic import Quadratic
from convexprune.core._symmetric import rounding_margin

PRICED = 1e11  # operations, those of a factor for each row, that a gap may take: some ten seconds of a core
AT_ONCE = 2**24  # numbers in the factors that are computed together


def gaps_on_kept(
    quadratic: Quadratic,
    penalty: AbstractPenalty,
    weight: Tensor,
    residual: Tensor,
    values: Tensor,
    slack: Tensor,
    doubt: float = 0.0,
) -> Tensor:
    """Bound the duality gap by row [m] without an inverse of H, by inverses of H on kept entries.

    For a penalty that couples rows, the bound is of all rows together: they keep the same entries, and share a factor.

    Let F be the non-zero entries after a proximal gradient step of length 1 / H_jj, and S the subgradient of p there
    nearest to K. The step y on F, y_F = (K - S)_F H_FF^-1, is the remaining move of least squares. So K - y H is S on F
    by construction, however small a strength is, and a factor s <= 1 brings the point into the domain of p*. The cost
    is

        p(V) + p*(s (K - y H)) - s <K - y H, V>  +  ((1 - s) sqrt(q) + s sqrt(1/2 y H y'))^2

    the last term by the triangle inequality, in outputs: sqrt(q) is the length of V's misfit, and y moves the outputs.
    Near the optimum s is 1, and the gap is y's gain, which falls with the square of the distance. Any F and any S in
    the domain make a bound. It is inf where H_FF is singular, or beyond `PRICED` operations.

    Rounding errs upwards: the factor is of H_FF less a margin, and y is off by at most e in the norm of H, which moves
    the dual point by at most e sqrt(H_jj). In doubt about H by d in the spectral norm, K is off by d |V - A|, and K - y
    H by d |V - A + y| and by what y is off: the doubt times the norm of H_FF^(-1/2).
    """
    gram = quadratic.gram
    scale = penalty.units(quadratic.scale())
    ahead = weight * scale + residual / scale
    ahead = torch.where(ahead == 0, torch.finfo(ahead.dtype).tiny, ahead)  # what has no penalty is kept
    ahead = penalty.scaled(scale).prox(ahead, 1.0)
    kept = (ahead != 0) & ~quadratic.dead
    dual = penalty.subgradient(ahead / scale, residual)
    if dual is None and not isinstance(penalty, Elementwise):
        return torch.full_like(values, inf)  # zeros do not tell where this penalty is smooth
    dual = penalty.project(residual) if dual is None else dual
    on = kept.any(0, keepdim=True) if penalty.couples_rows else kept
    if len(on) * int(on.sum(1).max()) ** 3 > PRICED:
        return torch.full_like(values, inf)
    kept = on.expand_as(kept)
    price, step, error, norm = _least_squares(gram, on, (residual - dual).view(len(on), -1, len(gram)), doubt)
    point = torch.addmm(residual, step, gram, alpha=-1)
    moved = quadratic.displacement(weight)
    before, after = (doubt * torch.linalg.vector_norm(each, dim=1) for each in (moved, moved + step))
    off = (error + norm * after)[:, None] * (gram.diagonal() + doubt).sqrt() + after[:, None]
    off = torch.where(kept, 0.0, off)
    point = torch.where(kept, dual, point)
    far = point + torch.copysign(off, point)
    s = penalty.dual_scale(far).clamp_max(1)
    product = torch.linalg.vecdot(point, weight) - torch.linalg.vecdot(off, weight.abs())  # at least that
    rest = slack + penalty.conjugate(s[:, None] * far) - s * product
    rest = rest.mean().expand_as(rest) if penalty.couples_rows else rest
    misfit = values + quadratic.rounding + before * torch.linalg.vector_norm(moved, dim=1) / 2
    cost = (1 - s) * misfit.sqrt() + s * (price.sqrt() + norm * before * 0.5**0.5)
    return (rest.clamp_min(0) + cost.square()).nan_to_num_(nan=inf)


def _least_squares(gram: Tensor, kept: Tensor, gradient: Tensor, doubt: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the step y = k H_FF^-1 of gradients k [g r n], of g groups of r rows that keep the same entries F [g n].

    First a bound on 1/2 y H y' [m = g r], inf where H_FF is not safely positive definite; then y [m n], a bound on its
    error in the norm of H [m], and in doubt a bound on the norm of H_FF^(-1/2) [m].
    """
    margin, most = rounding_margin(gram) + doubt, int(kept.sum(1).max())
    order = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]  # what is kept comes first
    found = []
    for groups in torch.arange(len(kept), device=kept.device).split(max(1, AT_ONCE // max(1, most) ** 2)):
        on, places = kept[groups].gather(1, order[groups]), order[groups, None].expand(-1, gradient.shape[1], -1)
        k = (gradient[groups].gather(2, places) * on[:, None]).mT
        squares = gram[order[groups, :, None], order[groups, None]] * (on[:, :, None] & on[:, None, :])
        safe = squares.clone()
        safe.diagonal(dim1=1, dim2=2).add_(torch.where(on, -margin, 1.0))
        factor, info = torch.linalg.cholesky_ex(safe)
        y = torch.cholesky_solve(k, factor)
        off = torch.linalg.solve_triangular(factor, k - squares @ y, upper=False).square().sum(1).sqrt()
        norm = torch.zeros_like(off)
        if doubt:
            unit = on[:, :, None] * torch.eye(most, dtype=gram.dtype, device=gram.device)
            inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
            norm += torch.linalg.matrix_norm(inverse)[:, None]
        price, wrong = (k * y).sum(1) / 2, (info != 0)[:, None]
        step = torch.zeros_like(gradient[groups]).scatter_(2, places, torch.where(wrong[:, None], 0.0, y).mT)
        found.append((torch.where(wrong, inf, price), step, *(torch.where(wrong, 0.0, each) for each in (off, norm))))
    price, step, error, norm = (torch.cat(each).flatten(0, 1) for each in zip(*found, strict=True))
    return price, step, error, norm
