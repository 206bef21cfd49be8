"""Penalties in CVXPY's atoms."""

from functools import singledispatch
from typing import Any

import cvxpy as cp
import numpy as np
import torch

from convexprune.core import (
    L1,
    AbstractPenalty,
    Blocks,
    ElasticNet,
    GroupLasso,
    NuclearNorm,
    ReverseHuber,
    RowGroups,
    Support,
    TotalVariation,
)
from convexprune.core._abstract_penalty import Scaled
from convexprune.errors import UnsupportedError

Constraints = list[Any]


@singledispatch
def stated(penalty: AbstractPenalty, weight: Any, constraints: Constraints) -> Any:
    """Return the penalty of an expression [m n], and append the constraints that it puts on the expression."""
    raise UnsupportedError(f"{type(penalty).__name__} has no statement in CVXPY.")


@stated.register
def _(penalty: L1, weight: Any, constraints: Constraints) -> Any:
    strength = _like(penalty.strength, weight)
    _zero(weight, np.isinf(strength), constraints)
    return cp.sum(cp.multiply(np.where(np.isinf(strength), 0, strength), cp.abs(weight)))


@stated.register
def _(penalty: Support, weight: Any, constraints: Constraints) -> Any:
    _zero(weight, ~np.broadcast_to(penalty.mask.cpu().numpy(), weight.shape), constraints)
    return 0


@stated.register
def _(penalty: ElasticNet, weight: Any, constraints: Constraints) -> Any:
    lower, upper = _like(penalty.lower, weight), _like(penalty.upper, weight)
    for bound, sign in ((lower, -1), (upper, 1)):
        places = np.nonzero(np.isfinite(bound))
        if len(places[0]):
            constraints.append(sign * weight[places] <= sign * bound[places])
    price = cp.sum(cp.multiply(_like(penalty.strength, weight), cp.abs(weight)))
    return price + cp.sum(cp.multiply(_like(penalty.ridge, weight) / 2, cp.square(weight)))


@stated.register
def _(penalty: ReverseHuber, weight: Any, constraints: Constraints) -> Any:
    curvature, slope, size = _like(penalty.curvature, weight), _like(penalty.slope, weight), cp.abs(weight)
    parabola = cp.multiply(curvature / 2, cp.square(cp.pos(size - slope / curvature)))
    return cp.sum(cp.multiply(slope, size) + parabola)


@stated.register
def _(penalty: GroupLasso, weight: Any, constraints: Constraints) -> Any:
    (m, n), block = weight.shape, penalty.block
    strength = _like(penalty.strength, weight)[0, ::block]
    blocks = cp.reshape(weight, (m * block, n // block), order="F")  # the columns of a block, one below another
    return strength @ cp.norm(blocks, axis=0)


@stated.register
def _(penalty: RowGroups, weight: Any, constraints: Constraints) -> Any:
    groups = np.broadcast_to(penalty.groups.cpu().numpy(), weight.shape)
    strength = np.broadcast_to(torch.as_tensor(penalty.strength).cpu().numpy(), (1, groups.max() + 1))[0]
    each = [(i, g, np.flatnonzero(row == g)) for i, row in enumerate(groups) for g in np.unique(row)]
    norms = [strength[g] * cp.norm(weight[i, places]) for i, g, places in each]
    return cp.sum(norms) + cp.sum(cp.multiply(_like(penalty.l1, weight), cp.abs(weight)))


@stated.register
def _(penalty: TotalVariation, weight: Any, constraints: Constraints) -> Any:
    price = cp.sum(cp.multiply(_like(penalty.l1, weight), cp.abs(weight)))
    if weight.shape[1] < 2:
        return price
    jumps = weight[:, 1:] - weight[:, :-1]
    return price + cp.sum(cp.multiply(_like(penalty.strength, jumps), cp.abs(jumps)))


@stated.register
def _(penalty: NuclearNorm, weight: Any, constraints: Constraints) -> Any:
    return penalty.strength * cp.normNuc(weight)


@stated.register
def _(penalty: Blocks, weight: Any, constraints: Constraints) -> Any:
    ends = np.cumsum([width for _, width in penalty.parts])
    each = zip(penalty.parts, ends, strict=True)
    return sum(stated(p, weight[:, end - width : end], constraints) for (p, width), end in each)


@stated.register
def _(penalty: Scaled, weight: Any, constraints: Constraints) -> Any:
    return penalty.factor * stated(penalty.penalty, weight / penalty.scale, constraints)


def _like(value: Any, weight: Any) -> np.ndarray:
    return np.broadcast_to(torch.as_tensor(value, dtype=torch.float64).cpu().numpy(), weight.shape)


def _zero(weight: Any, places: np.ndarray, constraints: Constraints) -> None:
    if places.any():
        constraints.append(weight[np.nonzero(places)] == 0)
