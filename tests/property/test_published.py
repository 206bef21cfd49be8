"""Wanda, SparseGPT and ALPS beside their formulas, written down slowly, on inputs with dead columns and with ties."""

import pytest
import torch
from strategies import Layer, make_chain, random
from torch import Tensor

from convexprune.constraints import Constraint, SemiStructured, Unstructured
from convexprune.pruners import ALPS, LayerProblem, SparseGPT, Wanda

ROUNDING = 1e-9  # float64 factorisations of well-conditioned Gram matrices
DEAD = [3, 4, 9]
PATTERNS = (Unstructured(0.5), Unstructured(0.5, "row"), Unstructured(0.7, "row"), SemiStructured(2, 4))
KINDS = ("plain", "dead", "ties", "dead and ties")


def posed(kind: str, pattern: Constraint, seed: int = 0) -> LayerProblem:
    layer = make_chain(7, 16, seed, correlation=0.7, tokens=60)
    inputs, weight = layer.pruned * (random(seed + 7, 16) / 2).exp(), layer.weight
    if "dead" in kind:
        inputs[:, DEAD] = 0
    if "ties" in kind:
        weight = weight.mul(1.5).round()  # many are equal, and some are zero
    return LayerProblem(weight, Layer(weight, inputs, inputs).moments, pattern)


def smallest(scores: Tensor, pattern: Constraint, first: int = 0) -> Tensor:
    """Mask of what is pruned of scores [m b], entry by entry; of equal scores the later ones."""
    m, b = scores.shape
    if isinstance(pattern, SemiStructured):
        lines = [[(i, j + k) for k in range(pattern.group)] for i in range(m) for j in range(0, b, pattern.group)]
        counts = [pattern.group - pattern.kept] * len(lines)
    elif pattern.by_row:
        lines = [[(i, j) for j in range(b)] for i in range(m)]
        counts = [(pattern.zeros(1, first + b) - pattern.zeros(1, first))] * m
    else:
        lines = [[(i, j) for i in range(m) for j in range(b)]]
        counts = [pattern.zeros(m, first + b) - pattern.zeros(m, first)]
    pruned = torch.zeros(m, b, dtype=torch.bool)
    for line, count in zip(lines, counts, strict=True):
        for place in sorted(line, key=lambda at: (float(scores[at]), -at[0], -at[1]))[:count]:
            pruned[place] = True
    return pruned


def with_ones(gram: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the codes of SparseGPT and ALPS do with dead inputs: H_jj = 1 and weights of zero."""
    dead = gram.diagonal() == 0
    return gram + torch.diag(dead.to(gram)), weight.masked_fill(dead, 0)


# Wanda


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_wanda_is_its_formula(kind: str, pattern: Constraint):
    """Sun et al. 2023, Eq. 1: S_ij = |W_ij| |X_j|_2, over all tokens; 0 for a dead input, whatever its weight."""
    problem = posed(kind, pattern)
    sizes = problem.moments.gram.diagonal().sqrt()
    scores = torch.stack([problem.weight[:, j].abs() * sizes[j] for j in range(16)], dim=1)
    expected = problem.weight.masked_fill(smallest(scores, pattern), 0)
    assert torch.equal(Wanda().prune(problem).weight, expected)


# SparseGPT


def slow_sparsegpt(problem: LayerProblem, block: int, damping: float) -> Tensor:
    """Frantar and Alistarh 2023, section 3: every column's own inverse of the Hessian of the columns that are left.

    After column j the inverse loses its first row and column by a step of Gaussian elimination (their Eq. 4),
    H_F^-1 <- (H_F^-1 - [H_F^-1]_:1 [H_F^-1]_1: / [H_F^-1]_11)_2:,2: ; weights move by Eq. 3, -w / [H^-1]_11 [H^-1]_1: .
    """
    live = problem.moments.gram.diagonal() > 0
    mean = problem.moments.gram.diagonal()[live].mean()  # the code's has its ones in it, in units of its own
    hessian, weight = with_ones(problem.moments.gram, problem.weight)
    m, n = weight.shape
    inverses = [torch.linalg.inv(hessian + damping * mean * torch.eye(n, dtype=hessian.dtype))]
    for _ in range(n - 1):
        inverse = inverses[-1]
        inverses.append((inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:])
    pruned = torch.zeros(m, n, dtype=torch.bool)
    width = problem.pattern.group if isinstance(problem.pattern, SemiStructured) else block
    for j in range(n):
        if j % width == 0:
            ahead = range(j, min(n, j + width))
            scores = torch.stack([weight[:, k].square() / inverses[k][0, 0] for k in ahead], dim=1)
            pruned[:, j : ahead.stop] = smallest(scores, problem.pattern, j)
        step = torch.where(pruned[:, j], weight[:, j] / inverses[j][0, 0], 0.0)
        weight[:, j:] -= torch.outer(step, inverses[j][0])
        weight[:, j].masked_fill_(pruned[:, j], 0.0)
    return weight


@pytest.mark.parametrize("block", [4, 5, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sparsegpt_is_the_paper_column_by_column(kind: str, pattern: Constraint, block: int):
    for seed in range(3):
        problem = posed(kind, pattern, seed)
        found = SparseGPT(block=block, damping=0.02).prune(problem).weight
        found = found.masked_fill(problem.dead, 0)  # a block may hold more dead weights than zeros
        expected = slow_sparsegpt(problem, 4 if isinstance(pattern, SemiStructured) else block, damping=0.02)
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


# ALPS


def slow_alps(problem: LayerProblem, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Meng et al. 2024, Algorithm 1 and its code: the mask, and the weights after ten conjugate gradients on it."""
    live = problem.moments.gram.diagonal() > 0
    gram, dense = with_ones(problem.moments.gram, problem.weight)
    gram = gram + damping * problem.moments.gram.diagonal()[live].mean() * torch.eye(len(gram), dtype=gram.dtype)
    scale = gram.diagonal().sqrt()
    gram, dense = gram / scale / scale[:, None], dense * scale
    target, identity = dense @ gram, torch.eye(len(gram), dtype=gram.dtype)
    kept = dense.masked_fill(smallest(dense.abs(), problem.pattern), 0)
    first, support, dual, rho, started = kept, kept != 0, torch.zeros_like(kept), 0.1, False
    count = dense.numel() - problem.pattern.zeros(*dense.shape)
    weight = dense
    for iteration in range(1, 301):
        weight = torch.linalg.solve(gram + rho * identity, target - dual + rho * kept, left=False)
        moved = weight + dual / rho
        pruned = smallest(moved.abs(), problem.pattern)
        kept = moved.masked_fill(pruned, 0)
        dual = dual + rho * (weight - kept)
        if iteration % 3:
            continue
        change, support = int((support ^ ~pruned).sum()), ~pruned
        if change == 0 and started:
            break
        if change > 0.005 * count or (change and started):
            rho *= 1.3 if change > 0.1 * count else 1.2 if change > 0.005 * count else 1.1
            started = True
        else:
            rho /= 5
            if change:
                kept, dual = first, torch.zeros_like(dual)
        if iteration > 30 and change < 0.0003 * count:
            break
    mask = ~smallest(weight.abs(), problem.pattern)
    weight = weight * mask
    residual = (target - weight @ gram) * mask
    direction = residual
    for _ in range(10):
        image = (direction @ gram) * mask
        step = (residual * residual).sum(1) / (direction * image).sum(1).clamp_min(1e-300)
        weight, before = weight + step[:, None] * direction, residual
        residual = residual - step[:, None] * image
        ratio = (residual * residual).sum(1) / (before * before).sum(1).clamp_min(1e-300)
        direction = residual + ratio[:, None] * direction
    return mask, weight / scale


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_alps_is_its_algorithm_with_a_linear_solve_in_every_step(kind: str, pattern: Constraint):
    for seed in range(3):
        problem = posed(kind, pattern, seed)
        found, (mask, weight) = ALPS().prune(problem), slow_alps(problem)
        rows, live = problem.squared_error(weight) > ROUNDING, ~problem.dead  # which zero a row keeps is chance
        assert rows.any()
        assert torch.equal(found.mask[rows][:, live], mask[rows][:, live])
        errors = [float(problem.squared_error(each).sum()) for each in (found.weight, weight)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-6)
