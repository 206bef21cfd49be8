import pytest
import torch
from hypothesis import given, settings
from pruning_cases import PATTERNS, correlated, error, layer_problem
from strategies import Layer, seeds

from convexprune.constraints import SemiStructured, Stacked, Unstructured
from convexprune.core._moments import Moments
from convexprune.errors import PruningError
from convexprune.pruners import (
    PRUNERS,
    Convex,
    FISTAPruner,
    LayerProblem,
    Magnitude,
    SparseGPT,
    Wanda,
)
from convexprune.solvers._fista import FISTA

ROUNDING = 1e-9  # float64 factorisations of well-conditioned Gram matrices


def test_wanda_is_its_formula_by_hand():
    # |X_j| = (5, 1, 2): scores [[5, 8, 2], [10, 3, 12]], the three largest are 12, 10 and 8.
    weight = torch.tensor([[-1.0, 8.0, 1.0], [2.0, 3.0, -6.0]])
    moments = Moments(3)
    moments.add(torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, -2.0]]))
    pruned = Wanda().prune(LayerProblem(weight, moments, Unstructured(0.5)))
    assert pruned.weight.tolist() == [[0.0, 8.0, 0.0], [2.0, 0.0, -6.0]]


def test_magnitude_keeps_the_largest_whatever_the_inputs():
    weight = torch.tensor([[-1.0, 4.0, 1.0], [2.0, 3.0, -6.0]])
    moments = Moments(3)
    moments.add(torch.tensor([[30.0, 0.1, 0.0]]))
    pruned = Magnitude().prune(LayerProblem(weight, moments, Unstructured(0.5)))
    assert pruned.weight.tolist() == [[0.0, 4.0, 0.0], [0.0, 3.0, -6.0]]


@pytest.mark.parametrize("method", sorted(PRUNERS))
def test_a_pattern_that_keeps_nothing_leaves_zeros(method):
    layer = correlated(0, m=1, n=8)
    weight, moments = layer.weight.float(), Moments(8)
    moments.add(layer.pruned.float())
    assert PRUNERS[method]().prune(LayerProblem(weight, moments, Unstructured(0.99))).weight.tolist() == [[0.0] * 8]


# SparseGPT


@pytest.mark.parametrize("block", [1, 6, 8])
def test_sparsegpt_keeps_a_group_together_whatever_the_block(block):
    problem = layer_problem(correlated(0), SemiStructured(2, 4))
    first, second = (SparseGPT(block=b).prune(problem).weight for b in (block, 128))
    torch.testing.assert_close(first, second, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("pruner", [SparseGPT(damping=0.0), Convex(damping=0.0)])
def test_a_singular_gram_without_damping_is_refused_with_advice(pruner):
    layer = correlated(0, tokens=6)
    with pytest.raises(PruningError, match=r"positive definite.*raise the damping"):
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
        alone = FISTAPruner().prune(LayerProblem(weight, layer.moments, Unstructured(0.5))).weight
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
