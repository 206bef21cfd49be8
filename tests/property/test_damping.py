"""The damping of `convex`: it grows with the noise of the tokens, pulls as its formula says, and helps."""

import pytest
import torch
from pruning_cases import correlated, layer_problem
from strategies import Layer, make_chain, random

from convexprune.constraints import Unstructured
from convexprune.core._damping import EIGENVALUE_KNEE, Damping
from convexprune.core._moments import Moments, sampling_noise
from convexprune.pruners import Convex, LayerProblem
from convexprune.pruners._damped import DOMAIN_SHIFT_RANGE, NOISE_GAIN, RIDGE, damped


def folds_of(layer: Layer) -> tuple[Moments, Moments]:
    first, second = Moments(layer.weight.shape[1], torch.float64), Moments(layer.weight.shape[1], torch.float64)
    first.add(layer.pruned[::2])
    second.add(layer.pruned[1::2])
    return first, second


def posed(pruner: Convex, problem: LayerProblem) -> Damping:
    damping = pruner.prune(problem).damping
    assert damping is not None
    return damping


def test_damping_falls_with_the_number_of_tokens_down_to_what_other_texts_ask_for():
    found = []
    for tokens in (24, 100, 20_000):
        layer = correlated(0, tokens=tokens)
        problem = layer_problem(layer, Unstructured(0.5), folds=folds_of(layer))
        found.append(posed(Convex(), problem).strength)
    least, most = DOMAIN_SHIFT_RANGE
    assert found[0] > found[1] > most + RIDGE > found[2] > least + RIDGE
    assert found[2] == pytest.approx(least + RIDGE, rel=0.1)


@pytest.mark.parametrize(("tokens", "for_others"), [(24, "most"), (1500, "some"), (20_000, "least")])
def test_damping_grows_with_the_noise(tokens, for_others):
    layer = correlated(0, tokens=tokens)
    folds = folds_of(layer)
    damping, noise = posed(Convex(), layer_problem(layer, Unstructured(0.5), folds=folds)), sampling_noise(folds)
    expected = {"least": DOMAIN_SHIFT_RANGE[0], "some": NOISE_GAIN * noise, "most": DOMAIN_SHIFT_RANGE[1]}[for_others]
    assert damping.saturating == pytest.approx(noise + expected)
    assert damping.ridge == pytest.approx(RIDGE)


@pytest.mark.parametrize("saturating", [0.0, 0.5])
def test_damping_pulls_as_its_formula_says(saturating):
    problem = layer_problem(correlated(0, change=0.3), Unstructured(0.5))
    found, given, d = damped(problem, Damping(0.2, saturating)), problem.quadratic, problem.scale
    energy, directions = torch.linalg.eigh(given.gram / d / d[:, None])
    pull = 0.2 + saturating * energy / (energy + EIGENVALUE_KNEE)
    change = random(1, *problem.weight.shape)  # V - W
    expected = given.values(problem.weight + change) + ((change * d) @ directions).square() @ pull / 2
    torch.testing.assert_close(found.values(problem.weight + change), expected)


def test_damping_helps_on_tokens_that_were_not_seen():
    errors = {None: 0.0, 1e-6: 0.0}
    for seed in range(5):
        seen, unseen = (make_chain(8, 16, seed + 1000 * k, 0.7, tokens) for k, tokens in enumerate((20, 4000)))
        problem = layer_problem(seen, Unstructured(0.5), folds=folds_of(seen))
        judge = LayerProblem(seen.weight, unseen.moments, Unstructured(0.5))
        for damping in errors:
            errors[damping] += float(judge.squared_error(Convex(damping=damping).prune(problem).weight).sum())
    assert errors[None] < errors[1e-6]
