import pytest
import torch
from hypothesis import given, settings
from pruning_cases import PATTERNS, correlated, error, layer_problem
from strategies import Layer, seeds

from convexprune.errors import PruningError
from convexprune.moments import Moments
from convexprune.pattern import SemiStructured, Stacked, Unstructured
from convexprune.pruners import (
    PRUNERS,
    Convex,
    FISTAPruner,
    Magnitude,
    PruningProblem,
    SparseGPT,
    Wanda,
)
from convexprune.solvers.fista import FISTA

ROUNDING = 1e-9  # float64 factorisations of well-conditioned Gram matrices


def test_wanda_is_its_formula_by_hand():
    # |X_j| = (5, 1, 2): scores [[5, 8, 2], [10, 3, 12]], the three largest are 12, 10 and 8.
    weight = torch.tensor([[-1.0, 8.0, 1.0], [2.0, 3.0, -6.0]])
    moments = Moments(3)
    moments.add(torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, -2.0]]))
    pruned = Wanda().prune(PruningProblem(weight, moments, Unstructured(0.5)))
    assert pruned.weight.tolist() == [[0.0, 8.0, 0.0], [2.0, 0.0, -6.0]]


def test_magnitude_keeps_the_largest_whatever_the_inputs():
    weight = torch.tensor([[-1.0, 4.0, 1.0], [2.0, 3.0, -6.0]])
    moments = Moments(3)
    moments.add(torch.tensor([[30.0, 0.1, 0.0]]))
    pruned = Magnitude().prune(PruningProblem(weight, moments, Unstructured(0.5)))
    assert pruned.weight.tolist() == [[0.0, 4.0, 0.0], [0.0, 3.0, -6.0]]


# SparseGPT


def slow_sparsegpt(problem: PruningProblem, block: int, damping: float) -> torch.Tensor:
    """Frantar and Alistarh 2023, section 3: every column's own inverse of the Hessian of the columns that are left.

    After column j the inverse loses its first row and column by a step of Gaussian elimination (their Eq. 4),
    H_F^-1 <- (H_F^-1 - [H_F^-1]_:1 [H_F^-1]_1: / [H_F^-1]_11)_2:,2: ; weights move by Eq. 3, -w / [H^-1]_11 [H^-1]_1: .
    """
    weight, hessian = problem.weight.clone(), problem.moments.gram
    m, n = weight.shape
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(n, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(hessian)]
    for _ in range(n - 1):
        inverse = inverses[-1]
        inverses.append((inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:])
    pruned = torch.zeros(m, n, dtype=torch.bool)
    group = problem.pattern.group if isinstance(problem.pattern, SemiStructured) else None
    for j in range(n):
        if j % (group or block) == 0:
            ahead = range(j, min(n, j + (group or block)))
            scores = torch.stack([weight[:, k].square() / inverses[k][0, 0] for k in ahead], dim=1)
            if isinstance(problem.pattern, SemiStructured):
                lowest = scores.argsort(dim=1)[:, : problem.pattern.group - problem.pattern.kept]
                chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, lowest, True)
            else:
                assert isinstance(problem.pattern, Unstructured)
                share = problem.pattern.sparsity
                count = round(share * m * (ahead.stop)) - round(share * m * ahead.start)
                chosen = torch.zeros_like(scores, dtype=torch.bool).flatten()
                chosen[scores.flatten().argsort()[:count]] = True
                chosen = chosen.view_as(scores)
            pruned[:, j : ahead.stop] = chosen
        step = torch.where(pruned[:, j], weight[:, j] / inverses[j][0, 0], 0.0)
        weight[:, j:] -= torch.outer(step, inverses[j][0])
        weight[:, j].masked_fill_(pruned[:, j], 0.0)
    return weight


@pytest.mark.parametrize(
    ("pattern", "block"),
    [(Unstructured(0.5), 128), (Unstructured(0.5), 4), (Unstructured(0.7), 5), (SemiStructured(2, 4), 8)],
    ids=str,
)
@settings(max_examples=5)
@given(seed=seeds)
def test_sparsegpt_is_the_paper_column_by_column(pattern, block, seed):
    problem = layer_problem(correlated(seed, m=7), pattern, correction=0.0)  # no share of 7 rows is whole
    found = SparseGPT(block=block, damping=0.02).prune(problem).weight
    expected = slow_sparsegpt(problem, block, damping=0.02)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize("block", [1, 6, 8])
def test_sparsegpt_keeps_a_group_together_whatever_the_block(block):
    problem = layer_problem(correlated(0), SemiStructured(2, 4))
    first, second = (SparseGPT(block=b).prune(problem).weight for b in (block, 128))
    torch.testing.assert_close(first, second, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("pruner", "words"), [(SparseGPT(damping=0.0), "SparseGPT"), (Convex(damping=0.0), "positive definite")]
)
def test_a_singular_gram_without_damping_is_refused_with_advice(pruner, words):
    layer = correlated(0, tokens=6)
    with pytest.raises(PruningError, match=f"{words}.*raise the damping"):
        pruner.prune(layer_problem(layer, Unstructured(0.5)))


# FISTAPruner


@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4), PATTERNS["stack"]], ids=str)
@pytest.mark.parametrize("warm_start", ["sparsegpt", "wanda"])
@settings(max_examples=5)
@given(seed=seeds)
def test_fistapruner_is_never_worse_than_its_warm_start(warm_start, pattern, seed):
    problem = layer_problem(correlated(seed, m=6, change=0.3), pattern)
    assert error(problem, FISTAPruner(warm_start=warm_start)) <= error(problem, PRUNERS[warm_start]())


def test_fistapruner_improves_on_wanda():
    problem = layer_problem(correlated(0), Unstructured(0.5))
    assert error(problem, FISTAPruner(warm_start="wanda")) < error(problem, Wanda())


def test_fistapruner_prunes_each_operator_of_a_stack_on_its_own():
    layer, heights = correlated(0, m=6), (2, 4)
    whole = FISTAPruner().prune(layer_problem(layer, Stacked.alike(Unstructured(0.5), heights))).weight
    for part, weight in zip(whole.split(heights), layer.weight.split(heights), strict=True):
        alone = FISTAPruner().prune(PruningProblem(weight, layer.moments, Unstructured(0.5))).weight
        torch.testing.assert_close(part, alone, rtol=0, atol=ROUNDING)


def test_fistapruner_bisects_the_strength_by_the_share_of_the_rounding_in_the_error(monkeypatch):
    strengths, solve = [], FISTA.solve

    def recorded(self, problem, start=None):
        strengths.append(float(problem.penalty.strength))
        return solve(self, problem, start)

    monkeypatch.setattr(FISTA, "solve", recorded)
    layer = correlated(0)
    problem = layer_problem(layer, Unstructured(0.5))
    solutions = FISTAPruner(strength=1.0, largest_strength=1e3, patience=8).prune(problem).solutions
    low, high, expected, directions = 0.0, 1e3, [1.0], set()
    for solution in solutions:
        rounded = solution.weight * problem.pattern.mask(solution.weight.abs())
        total, before = (float(problem.squared_error(w).sum()) ** 0.5 for w in (rounded, solution.weight))
        raised = (total - before) / total > 0.3
        low, high = (expected[-1], high) if raised else (low, expected[-1])
        expected.append((low + high) / 2)
        directions.add(raised)
    assert directions == {True, False}
    assert [s * len(layer.pruned) for s in strengths] == pytest.approx(expected[:-1])


def test_the_strengths_of_fistapruner_are_in_units_of_the_sum_over_tokens():
    layer = correlated(0)
    twice = Layer(layer.weight, layer.pruned.repeat(2, 1), layer.pruned.repeat(2, 1))
    first = FISTAPruner(strength=1.0, largest_strength=100.0).prune(layer_problem(layer, Unstructured(0.5)))
    second = FISTAPruner(strength=2.0, largest_strength=200.0).prune(layer_problem(twice, Unstructured(0.5)))
    torch.testing.assert_close(first.solutions[-1].weight, second.solutions[-1].weight, rtol=0, atol=ROUNDING)


# Convex
