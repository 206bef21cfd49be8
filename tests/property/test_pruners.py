import pytest
import torch
from hypothesis import given, settings
from pruning_cases import PATTERNS, correlated, error, layer_problem
from strategies import Layer, seeds

from convexprune.constraints import SemiStructured, Stacked, Unstructured
from convexprune.pruners import (
    PRUNERS,
    Convex,
    Magnitude,
    SparseGPT,
    Wanda,
)

REFITTED = 1e-3  # conjugate gradients stop at gradients of 1e-4 of those at the start


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@settings(max_examples=3)
@given(seed=seeds)
def test_every_pruner_keeps_exactly_what_the_pattern_allows(name, pattern, seed):
    problem = layer_problem(correlated(seed, m=6, change=0.3), pattern)
    pruned = PRUNERS[name]().prune(problem)
    assert int((~pruned.mask).sum()) == pattern.zeros(6, 16)
    assert not pruned.weight[~pruned.mask].any()
    assert pruned.weight[pruned.mask].all()  # random data: no kept weight is zero by chance


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("group", [(2, 4), (3, 8)])
def test_every_pruner_keeps_n_of_every_group(name, group):
    kept, width = group
    problem = layer_problem(correlated(0), SemiStructured(kept, width))
    groups = PRUNERS[name]().prune(problem).weight.reshape(-1, width)
    assert (groups != 0).sum(1).tolist() == [kept] * len(groups)


@pytest.mark.parametrize("stack", ["stack", "uneven stack", "uneven stack of N:M"])
@pytest.mark.parametrize("name", PRUNERS)
def test_every_operator_of_a_stack_has_its_own_count(name, stack):
    pattern = PATTERNS[stack]
    assert isinstance(pattern, Stacked)
    problem = layer_problem(correlated(0, m=6), pattern)
    parts = PRUNERS[name]().prune(problem).weight.split(pattern.heights)
    for part, own in zip(parts, pattern.constraints, strict=True):
        assert int((part == 0).sum()) == own.zeros(*part.shape)
        own.check(*part.shape)


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_leaves_the_weight_it_was_given_as_it_was(name):
    layer = correlated(0, change=0.3)
    before = layer.weight.clone()
    PRUNERS[name]().prune(layer_problem(layer, Unstructured(0.5)))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("name", PRUNERS)
def test_dead_inputs_are_pruned_without_a_nan(name, pattern):
    layer = correlated(0)
    layer.pruned[:, [2, 3]] = 0
    pruned = PRUNERS[name]().prune(layer_problem(layer, pattern))
    assert pruned.weight.isfinite().all()
    assert int((~pruned.mask).sum()) == pattern.zeros(8, 16)


@pytest.mark.parametrize("name", sorted(PRUNERS.keys() - {"magnitude"}))  # which does not look at the inputs
def test_dead_inputs_are_the_first_to_go(name):
    layer = correlated(0)
    layer.pruned[:, [2, 3]] = 0
    layer.weight[:, [2, 3]] = 0.1
    mask = PRUNERS[name]().prune(layer_problem(layer, Unstructured(0.5, "row"))).mask
    assert not mask[:, [2, 3]].any()


@pytest.mark.parametrize("name", PRUNERS)
def test_a_float32_layer_stays_float32(name):
    layer = correlated(0)
    single = Layer(layer.weight.float(), layer.pruned.float(), layer.pruned.float())
    assert PRUNERS[name]().prune(layer_problem(single, Unstructured(0.5))).weight.dtype == torch.float32


# A sparsity of zero


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])
def test_a_sparsity_of_zero_returns_the_very_weight_where_kept_weights_do_not_change(pruner):
    layer = correlated(0, change=0.3)
    assert torch.equal(pruner.prune(layer_problem(layer, Unstructured(0.0))).weight, layer.weight)


def test_a_sparsity_of_zero_without_correction_returns_the_very_weight_from_sparsegpt():
    layer = correlated(0, change=0.3)
    assert torch.equal(SparseGPT().prune(layer_problem(layer, Unstructured(0.0), 0.0)).weight, layer.weight)


@pytest.mark.parametrize("name", ["convex", "fistapruner"])
def test_a_sparsity_of_zero_without_correction_returns_nearly_the_weight_after_a_solve(name):
    layer = correlated(0, change=0.3)
    weight = PRUNERS[name]().prune(layer_problem(layer, Unstructured(0.0), 0.0)).weight
    torch.testing.assert_close(weight, layer.weight, rtol=0, atol=REFITTED * float(layer.weight.abs().max()))


def test_a_sparsity_of_zero_with_correction_solves_for_the_dense_output():
    layer = correlated(0, change=0.3)
    problem = layer_problem(layer, Unstructured(0.0))
    for pruner in (Convex(), SparseGPT()):
        assert error(problem, pruner) < error(problem, Magnitude())  # which returns the weight


# Magnitude and Wanda
