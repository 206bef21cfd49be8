"""`convex` with the penalties that are not its default: plain ones in the units of their names, and that for groups."""

import pytest
import torch
from pruning_cases import PATTERNS, Recorder, correlated, error, layer_problem

from convexprune.errors import PatternError, RecipeError
from convexprune.group_products import GroupProducts
from convexprune.pattern import SemiStructured, Unstructured
from convexprune.penalty import L1
from convexprune.pruners import Convex, Wanda
from convexprune.pruners.damped import Damping, saliency_coordinates


@pytest.mark.parametrize("solver", ["fista", "admm"])
@pytest.mark.parametrize("penalty", ["l1", "weighted-l1"])
def test_a_plain_penalty_is_bisected_to_the_zeros_of_the_pattern(penalty, solver):
    problem = layer_problem(correlated(0, m=16, n=32, change=0.3), Unstructured(0.5))
    recorder = Recorder(solver=Convex.solver_for(solver, penalty))
    pruned = Convex(penalty=penalty, solver=recorder, refit=None, damping=0.05).prune(problem)
    weights = [solution.weight for _, _, solution in recorder.calls]
    zeros = [int((weight == 0).sum()) for weight in weights]
    assert max(z for z in zeros if z <= 256) >= 250  # of 512, half are wanted
    near = max((w for w, z in zip(weights, zeros, strict=True) if z <= 256), key=lambda w: int((w == 0).sum()))
    assert not pruned.mask[near == 0].any()  # what is kept is what the LASSO leaves


@pytest.mark.parametrize("penalty", ["l1", "weighted-l1"])
def test_a_plain_penalty_has_the_units_that_its_name_says(penalty):
    problem = layer_problem(correlated(0), Unstructured(0.5))
    recorder = Recorder(solver=Convex.solver_for("fista", penalty))
    Convex(penalty=penalty, solver=recorder, damping=0.1).prune(problem)
    called = recorder.calls[0][0]
    assert isinstance(called.penalty, L1)
    _, scale = saliency_coordinates(problem, Damping(0.1))
    strength = called.penalty.strength * scale  # of the weight in its own coordinates
    unit = problem.scale if penalty == "weighted-l1" else torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(strength / strength[0], unit / unit[0])


def test_the_penalty_for_groups_needs_groups_and_keeps_them():
    with pytest.raises(PatternError, match="N:M"):
        Convex(penalty="group-products").prune(layer_problem(correlated(0), Unstructured(0.5)))
    for pattern in (SemiStructured(2, 4), PATTERNS["stack of 2:4"]):
        problem = layer_problem(correlated(0, m=6), pattern)
        recorder = Recorder()
        pruned = Convex(penalty="group-products", solver=recorder).prune(problem)
        assert (pruned.mask.view(-1, 4).sum(1) == 2).all()
        assert {type(called.penalty) for called, _, _ in recorder.calls} == {GroupProducts}
        assert error(problem, Convex(penalty="group-products")) < error(problem, Wanda())


def test_an_unknown_penalty_is_refused_with_a_guess():
    with pytest.raises(RecipeError, match="weighted-l1"):
        Convex(penalty="weigthed-l1")  # pyright: ignore[reportArgumentType]
