"""The bound in a report: of the problem that was posed, on the same rows in every run, and no weight depends on it."""

from itertools import combinations

import pytest
import torch
from brute_force import best_pruning
from door import SMALL, state
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import layer_problem, sampled_bounds
from strategies import make_layer, seeds

import convexprune
from convexprune._layerwise.steps import measure as bounding
from convexprune.constraints import SemiStructured, Stacked, Unstructured
from convexprune.core._moments import Moments
from convexprune.pruners import ADMM, Convex, Damping, LayerProblem, Refitted, Wanda
from convexprune.pruners._damped import damped
from convexprune.report import Report

PATTERNS = (Unstructured(0.5), Unstructured(0.5, "row"), SemiStructured(2, 4))


@settings(max_examples=20)
@given(st.sampled_from(PATTERNS), seeds, st.sampled_from((0.01, 0.1, 1.0)))
def test_no_pruning_of_the_damped_problem_is_better_than_its_bound(pattern, seed, damping):
    # Damping is as good as more tokens: one for each input, of length sqrt(damping * tokens * H_jj).
    layer = make_layer("full rank", 2, 8, seed, 0.0)
    problem = layer_problem(layer, pattern)
    tokens = problem.moments.tokens
    more = Moments(8, torch.float64)
    more.add((damping * tokens * problem.moments.gram.diagonal()).sqrt().diag())
    whole = LayerProblem(problem.weight, problem.moments + more, pattern)
    best = best_pruning(whole)
    least = float(whole.squared_error(best).sum()) * (tokens + 8) / tokens
    (bound,) = sampled_bounds(problem, best, 2, Damping(damping))
    assert bound is not None
    assert bound["error"] == pytest.approx(least)
    assert 0 < bound["lower"] <= least * (1 + 1e-9)
    assert bound["ratio"] == bound["lower"] / bound["error"]


def test_the_damping_of_the_problem_is_what_the_pruner_said():
    problem = layer_problem(make_layer("full rank", 3, 8, 0), Unstructured(0.5))
    for pruner, damping in ((Convex(damping=0.2), 0.2), (ADMM(damping=0.3), 0.3), (Wanda(), 0.0),
                            (Refitted(Wanda(), damping=0.1), 0.1)):  # fmt: skip
        assert (pruner.prune(problem).damping or Damping(0.0)) == Damping(damping)


def test_a_damping_that_saturates_is_bounded():
    layer = make_layer("full rank", 2, 8, 3, 0.0)
    problem, damping = layer_problem(layer, Unstructured(0.5, "row")), Damping(0.25, 0.5)
    posed = damped(problem, damping)
    (bound,) = sampled_bounds(problem, Convex().prune(problem).weight, 2, damping)
    least = 0.0
    for row in posed.at(None).cross:
        supports = (torch.tensor(s) for s in combinations(range(8), 4))
        gains = [row[s] @ torch.linalg.solve(posed.gram[s][:, s], row[s]) for s in supports]
        least -= float(max(gains))
    least += float(posed.at(None).energy.sum())
    assert bound is not None and 0 < bound["lower"] <= least * (1 + 1e-9) <= bound["error"] * (1 + 1e-8)


def test_what_is_too_wide_or_not_pruned_has_no_bound(monkeypatch):
    problem = layer_problem(make_layer("full rank", 3, 8, 0), Unstructured(0.5))
    weight = Wanda().prune(problem).weight
    assert sampled_bounds(problem, weight, 0, Damping(0.0)) == [None]
    nothing = layer_problem(make_layer("full rank", 3, 8, 0), Unstructured(0.0))
    assert sampled_bounds(nothing, weight, 2, Damping(0.0)) == [None]
    (fitted,) = sampled_bounds(problem, weight, 3, Damping(0.0))
    monkeypatch.setattr(bounding, "WIDE", 7)  # the first split
    (first,) = sampled_bounds(problem, weight, 3, Damping(0.0))
    assert fitted is not None and first is not None and 0 < first["lower"] != fitted["lower"] > 0
    monkeypatch.setattr(bounding, "WIDEST", 7)
    assert sampled_bounds(problem, weight, 2, Damping(0.0)) == [None]


@pytest.mark.parametrize(
    "patterns",
    [
        *((pattern,) * 3 for pattern in PATTERNS),
        tuple(Unstructured(share, "row") for share in (0.0, 0.75, 0.25)),
        (SemiStructured(3, 4), SemiStructured(1, 4), SemiStructured(2, 4)),
    ],
    ids=lambda patterns: ", ".join(map(str, patterns)),
)
@pytest.mark.parametrize("rows", [2, 100])
def test_operators_that_share_an_input_have_the_bounds_that_each_has_alone(patterns, rows):
    layer = make_layer("full rank", 9, 8, 3, 0.1)
    damping = Damping(0.1, 0.2)
    problem = layer_problem(layer, Stacked(patterns, (4, 2, 3)))
    weight = Wanda().prune(problem).weight
    together = sampled_bounds(problem, weight, rows, damping)
    parts = zip(problem.operators(), weight.split((4, 2, 3)), strict=True)
    alone = [sampled_bounds(part, own, rows, damping) for part, own in parts]
    for (own,), found, pattern in zip(alone, together, patterns, strict=True):
        if not pattern.zeros(1, 8):
            assert own is found is None
            continue
        assert own is not None and found is not None
        assert found == pytest.approx(own, rel=1e-6) and found["rows"] == own["rows"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_run_reports_bounds_and_its_weights_do_not_depend_on_them(tiny_opt, pattern):
    dense = state(tiny_opt)
    with_bounds = convexprune.prune(tiny_opt.model, pattern=pattern, **{**SMALL, "bound_rows": 2}).report
    pruned = state(tiny_opt)
    for o in with_bounds.operators:
        assert o.bound is not None
        assert o.bound["rows"] == 2 and o.damping is not None and o.bound["damping"] == o.damping.strength
        assert 0 <= o.bound["lower"] <= o.bound["error"]
    tiny_opt.model.load_state_dict(dense, strict=False)
    without = convexprune.prune(tiny_opt.model, pattern=pattern, **SMALL).report
    assert all(torch.equal(p, pruned[name]) for name, p in tiny_opt.model.named_parameters())
    assert all(o.bound is None for o in without.operators) and without.median_bound_ratio is None
    ratios = sorted(o.bound["ratio"] for o in with_bounds.operators if o.bound)
    assert with_bounds.median_bound_ratio is not None
    assert ratios[0] <= with_bounds.median_bound_ratio <= ratios[-1]
    again = Report.from_json(with_bounds.to_json())
    assert again.operators == with_bounds.operators and "bound" in [c.header for c in again.table().columns]
