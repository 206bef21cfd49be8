"""Inputs that are always zero: their weights are the first to go, cost nothing, and change nothing else."""

import pytest
import torch
from pruning_cases import layer_problem, sampled_bounds
from strategies import Layer, make_chain, random
from torch import Tensor

from convexprune.constraints import Constraint, SemiStructured, Unstructured
from convexprune.core._moments import Moments
from convexprune.pruners import PRUNERS, Convex, Damping, LayerProblem, Refitted, SparseGPT
from convexprune.pruners._base import filled
from convexprune.solvers import Status

ROWS, INPUTS = 16, 40
LOOKING = sorted(PRUNERS.keys() - {"magnitude"})  # which does not look at the inputs
ALIKE = 0.05  # supports are not optimal, so that neither error is always the smaller
CASES = {  # the pattern, the sizes of live inputs, the number of dead ones
    "matrix, 5 %, 1": (Unstructured(0.5), 1.0, 2),
    "matrix, 5 %, .02": (Unstructured(0.5), 0.02, 2),
    "matrix, 20 %, .1": (Unstructured(0.5), 0.1, 8),
    "row, 20 %, .02": (Unstructured(0.5, "row"), 0.02, 8),
    "2:4, 25 %, .02": (SemiStructured(2, 4), 0.02, 10),
}


def posed(weight: Tensor, inputs: Tensor, pattern: Constraint, dense: Tensor | None = None) -> LayerProblem:
    folds = tuple(Moments(inputs.shape[1], torch.float64) for _ in range(2))
    for i, fold in enumerate(folds):
        fold.add(inputs[i::2], None if dense is None else dense[i::2])
    return LayerProblem(weight, folds[0] + folds[1], pattern, folds=folds)


def drawn(pattern: Constraint, size: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs of about that size, and which of them are dead; for N:M, one of every group."""
    layer = make_chain(ROWS, INPUTS, seed=3, correlation=0.7, tokens=6 * INPUTS)
    dead = torch.zeros(INPUTS, dtype=torch.bool)
    dead[slice(1, None, 4) if isinstance(pattern, SemiStructured) else random(8, INPUTS).argsort()[:count]] = True
    inputs = layer.pruned * size * (random(12, INPUTS) / 2).exp()
    return layer.weight, inputs.masked_fill(dead, 0), dead


def on_the_live(pattern: Constraint, count: int) -> Constraint:
    """The pattern with as many non-zeros on the live inputs alone."""
    if isinstance(pattern, SemiStructured):
        return SemiStructured(pattern.kept, pattern.group - 1)
    assert isinstance(pattern, Unstructured)
    return Unstructured(1 - (1 - pattern.sparsity) * INPUTS / (INPUTS - count), pattern.quota)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_error_is_that_on_the_live_inputs_with_as_many_weights(name, case):
    pattern, size, count = case
    weight, inputs, dead = drawn(pattern, size, count)
    whole = posed(weight, inputs, pattern)
    live = posed(weight[:, ~dead], inputs[:, ~dead], on_the_live(pattern, count))
    pruned, expected = PRUNERS[name]().prune(whole), PRUNERS[name]().prune(live)
    assert int(pruned.mask.sum()) == int(expected.mask.sum()) == ROWS * INPUTS - pattern.zeros(ROWS, INPUTS)
    assert not pruned.mask[:, dead].any()
    error, least = whole.squared_error(pruned.weight).sum(), live.squared_error(expected.weight).sum()
    assert float(error / least) == pytest.approx(1, abs=ALIKE)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("quota", ["matrix", "row"])
def test_where_fewer_zeros_are_asked_than_there_are_dead_weights_the_others_stay_as_they_are(name, quota):
    weight, inputs, dead = drawn(Unstructured(0.1), 0.1, 8)
    pruned = PRUNERS[name]().prune(posed(weight, inputs, Unstructured(0.1, quota)))
    assert pruned.mask[:, ~dead].all()
    kept = pruned.mask & dead
    assert kept.any()
    assert torch.equal(pruned.weight[kept], weight[kept])


def test_a_refit_leaves_the_dead_weights_of_another_method_as_they_are():
    weight, inputs, dead = drawn(Unstructured(0.1), 0.1, 8)
    pruned = Refitted(SparseGPT(), damping=0.01).prune(posed(weight, inputs, Unstructured(0.1)))
    kept = pruned.mask & dead
    assert kept.any()
    assert torch.equal(pruned.weight[kept], weight[kept])


def test_what_a_dead_input_brings_in_the_dense_network_is_still_made_up_for():
    weight, inputs, dead = drawn(Unstructured(0.5), 1.0, 8)
    dense = inputs + 0.3 * random(21, *inputs.shape)
    problem = posed(weight, inputs, Unstructured(0.5), dense)
    trial = weight + random(22, *weight.shape)
    found = filled(problem).squared_error(trial.masked_fill(dead, 0))
    torch.testing.assert_close(found, problem.squared_error(trial))
    targets = dense @ weight.T
    torch.testing.assert_close(found, (inputs @ trial.T - targets).square().mean(0))


def test_inputs_that_are_all_dead_cost_nothing():
    layer = Layer(random(0, 4, 8), torch.zeros(9, 8, dtype=torch.float64), torch.zeros(9, 8, dtype=torch.float64))
    for pruner in (*(kind() for kind in PRUNERS.values()), Refitted(PRUNERS["wanda"]())):
        pruned = pruner.prune(layer_problem(layer, SemiStructured(2, 4)))
        assert pruned.weight.isfinite().all()
        assert all(solution.status is Status.SOLVED for solution in pruned.solutions)
        assert torch.equal(pruned.weight, layer.weight * pruned.mask)


@pytest.mark.parametrize("damping", [Damping(0.1), Damping(0.003, 0.1)], ids=["ridge", "saturating"])
def test_the_bound_holds_where_dead_weights_cost_nothing(damping):
    weight, inputs, _ = drawn(Unstructured(0.5), 0.02, 8)
    problem = posed(weight, inputs, Unstructured(0.5, "row"))
    pruned = Convex().prune(problem).weight
    (bound,) = sampled_bounds(problem, pruned, rows=4, damping=damping)
    assert bound is not None
    assert 0.3 < bound["ratio"] <= 1
