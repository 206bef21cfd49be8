"""The path of `convex`: its formulas round by round, and how near it comes to the best of all supports."""

from dataclasses import replace
from itertools import combinations
from math import isfinite

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import PATTERNS, Recorder, correlated, error, layer_problem
from strategies import Layer, make_chain, random, seeds

from convexprune.constraints import SemiStructured, Unstructured
from convexprune.core._penalty import L1
from convexprune.errors import UnsupportedError
from convexprune.pruners import (
    PRUNERS,
    Convex,
    LayerProblem,
    SparseGPT,
    Wanda,
)
from convexprune.pruners._convex import _strengths
from convexprune.solvers import Status, make_solver

ROUNDING = 1e-9  # float64 factorisations of well-conditioned Gram matrices
NEAR_OPTIMAL = 1.10  # the convex path is a heuristic for a combinatorial problem: this near to the best support
STIFFNESS = 2.0  # of the envelope, in the tests of the path


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("rival", ["magnitude", "wanda", "sparsegpt", "fistapruner"])
def test_convex_has_the_smallest_error_on_correlated_inputs(rival, pattern):
    for seed in range(5):
        problem = layer_problem(correlated(seed, m=16, n=32, change=0.3), pattern)
        assert error(problem, Convex()) < error(problem, PRUNERS[rival]())


def best_rows(problem: LayerProblem, kept: int) -> torch.Tensor:
    """mean |v x - w x|^2 of each row [m] for its best support of `kept` inputs, by trying every one."""
    gram, weight = problem.moments.gram, problem.weight
    m, n = weight.shape
    best = torch.full((m,), float("inf"), dtype=weight.dtype)
    for support in combinations(range(n), kept):
        inside = torch.tensor(support)
        outside = torch.tensor([j for j in range(n) if j not in support])
        # On the best values of a support, the error is the Schur complement of what is left out.
        schur = gram[outside][:, outside] - gram[outside][:, inside] @ torch.linalg.solve(
            gram[inside][:, inside], gram[inside][:, outside]
        )
        rest = weight[:, outside]
        best = torch.minimum(best, ((rest @ schur) * rest).sum(1))
    return best


def few_inputs(correlation: float) -> list[LayerProblem]:
    """Five layers so narrow that every support can be tried."""
    layers = [make_chain(12, 10, seed, correlation, tokens=200) for seed in range(5)]
    return [layer_problem(layer, Unstructured(0.5, "row")) for layer in layers]


@pytest.mark.parametrize("correlation", [0.5, 0.7, 0.9])
def test_convex_is_near_the_best_of_all_supports(correlation):
    problems = few_inputs(correlation)
    found = sum(error(problem, Convex(damping=0.0)) for problem in problems)
    best = sum(float(best_rows(problem, kept=5).sum()) for problem in problems)
    assert found <= NEAR_OPTIMAL * best


def test_convex_is_nearer_than_half_way_to_the_best_on_nearly_singular_inputs():
    # Where all inputs depend on all others (condition about 1000), no support is found for certain.
    problems = [layer_problem(correlated(s, m=12, n=10), Unstructured(0.5, "row")) for s in range(8)]
    best = sum(float(best_rows(problem, kept=5).sum()) for problem in problems)
    found, *rivals = (sum(error(problem, p) for problem in problems) for p in (Convex(), SparseGPT(), Wanda()))
    assert found - best < (min(rivals) - best) / 2


@pytest.mark.parametrize(
    "pruner", [Convex(damping=0.0), *(make() for make in PRUNERS.values())], ids=lambda p: type(p).__name__
)
def test_no_row_of_any_pruner_is_below_the_best_of_all_supports(pruner):
    for problem in [layer_problem(correlated(0, m=12, n=10), Unstructured(0.5, "row")), *few_inputs(0.7)]:
        found = problem.squared_error(pruner.prune(problem).weight)
        assert (found >= best_rows(problem, kept=5) * (1 - ROUNDING)).all()


@settings(max_examples=5)
@given(seeds)
def test_correction_comes_nearer_to_the_dense_output_than_none(seed):
    layer = correlated(seed, change=0.3)
    target = layer.dense @ layer.weight.T
    errors = []
    for correction in (1.0, 0.0):
        weight = Convex().prune(layer_problem(layer, Unstructured(0.5), correction)).weight
        errors.append(float((layer.pruned @ weight.T - target).square().sum()))
    assert errors[0] < errors[1]


def test_the_refit_of_convex_is_optimal_on_its_support():
    layer = correlated(0, change=0.3)
    tight = make_solver("cg", tolerance=1e-12, max_iterations=500)
    pruned = Convex(damping=0.1, refit=tight).prune(layer_problem(layer, Unstructured(0.5)))
    # The damped problem in plain coordinates: row by row the normal equations of the support.
    moments = layer.moments
    assert moments.cross is not None
    gram = moments.gram + 0.1 * torch.diag(moments.gram.diagonal())
    slope = layer.weight @ moments.cross + layer.weight @ gram
    for i, kept in enumerate(pruned.mask):
        expected = torch.linalg.solve(gram[kept][:, kept], slope[i, kept])
        torch.testing.assert_close(pruned.weight[i, kept], expected, rtol=1e-6, atol=1e-6)


def test_the_refit_lowers_the_error_of_the_path():
    problem = layer_problem(correlated(0, change=0.3), Unstructured(0.5))
    assert error(problem, Convex()) < error(problem, Convex(refit=None))


def test_each_problem_of_the_path_is_started_where_the_last_two_rounds_point():
    recorder = Recorder()
    Convex(solver=recorder, rounds=6).prune(layer_problem(correlated(0), Unstructured(0.5)))
    dense = recorder.calls[0][0].quadratic.anchor
    assert dense is not None
    weights = [dense, dense, *(solution.weight for _, _, solution in recorder.calls)]
    for k, (_, start, _) in enumerate(recorder.calls):
        torch.testing.assert_close(start, 2 * weights[k + 1] - weights[k], rtol=0, atol=ROUNDING)


def scores_at(problem, weight, reach):
    """The weight after a long gradient step on the envelope."""
    return weight + reach / STIFFNESS * problem.quadratic.residual(weight)


def scores_after(call, reach):
    problem, _, solution = call
    return scores_at(problem, solution.weight, reach)


def one_envelope(solver, reach=3.0):
    """The path with a single, known envelope."""
    return Convex(
        solver=solver, rounds=4, strengths=(0.2, 1.6), stiffnesses=(STIFFNESS, STIFFNESS), envelopes=1, reach=reach
    )


def test_the_strengths_of_the_path_follow_the_formula_at_the_scores():
    recorder = Recorder()
    one_envelope(recorder).prune(layer_problem(correlated(0), Unstructured(0.5)))
    for strength, call in zip((0.2, 0.4, 0.8, 1.6), recorder.calls, strict=True):
        scores = scores_at(call[0], call[1], reach=3.0)
        threshold = scores.abs().flatten().sort().values[scores.numel() // 2]
        assert isinstance(call[0].penalty, L1)
        expected = strength * threshold * torch.exp(-((scores / threshold) ** 2))
        torch.testing.assert_close(call[0].penalty.strength, expected, rtol=ROUNDING, atol=0)


def test_no_strength_is_denormal_however_large_the_score():
    scores = torch.tensor([[0.0, 0.5, 3.0, 9.3, 10.0, 1e4]])  # exp(-9.3^2) and exp(-10^2) are denormal in float32
    found = _strengths(scores, torch.tensor([[1.0]]), torch.tensor(0.5))
    torch.testing.assert_close(found[:, :3], 0.5 * torch.exp(-scores[:, :3].square()))
    assert float(found.min()) > torch.finfo(torch.float32).tiny and float(found[:, 3:].max()) < 1e-27


def test_convex_keeps_the_largest_scores():
    recorder, pattern = Recorder(), Unstructured(0.5)
    mask = one_envelope(recorder).prune(layer_problem(correlated(0), pattern)).mask
    assert torch.equal(mask, pattern.mask(scores_after(recorder.calls[-1], reach=3.0).abs()))


def test_without_a_refit_convex_returns_the_scores_it_keeps():
    problem = layer_problem(correlated(0), Unstructured(0.5))
    first, second = Recorder(), Recorder()
    refitted = one_envelope(first).prune(problem)
    scored = replace(one_envelope(second), refit=None).prune(problem)
    scores = scores_after(second.calls[-1], reach=3.0) * scored.mask
    assert torch.equal(scored.mask, refitted.mask)
    # In the path's coordinates the columns are only scaled.
    ratio = (scored.weight / scores)[scored.mask]
    columns = torch.where(scored.mask, scored.weight / scores, -torch.inf).amax(0).expand(8, 16)[scored.mask]
    torch.testing.assert_close(ratio, columns, rtol=ROUNDING, atol=0)


def test_the_path_is_in_coordinates_where_the_inverse_gram_has_a_constant_diagonal():
    recorder = Recorder()
    one_envelope(recorder).prune(layer_problem(correlated(0), Unstructured(0.5)))
    # The envelope's Gram matrix is  s - s^2 (H + s)^-1 , so that  H^-1 = envelope^-1 - 1 / s.
    relaxed = recorder.calls[0][0].quadratic.gram
    diagonal = torch.linalg.inv(relaxed).diagonal() - 1 / STIFFNESS
    torch.testing.assert_close(diagonal, diagonal.mean().expand(16), rtol=1e-6, atol=0)


def test_the_envelopes_of_the_path_stiffen_from_one_end_to_the_other():
    recorder = Recorder()
    Convex(solver=recorder, rounds=6, stiffnesses=(0.5, 2.0), envelopes=3).prune(
        layer_problem(correlated(0), Unstructured(0.5))
    )
    # The largest eigenvalue of an envelope is s H / (H + s), so  1 / (1 / it - 1 / s)  is H's, the same for all.
    largest = [float(torch.linalg.eigvalsh(problem.quadratic.gram).max()) for problem, _, _ in recorder.calls]
    expected = [1 / (1 / x - 1 / s) for x, s in zip(largest, (0.5, 0.5, 1.0, 1.0, 2.0, 2.0), strict=True)]
    assert expected == pytest.approx([expected[0]] * 6, rel=1e-6)


def test_a_path_without_certificates_between_is_the_path_with_all_of_them():
    problem = layer_problem(correlated(0), Unstructured(0.5))
    recorder = Recorder()  # has no way to step: it solves
    certified = Convex(solver=recorder).prune(problem)
    torch.testing.assert_close(Convex().prune(problem).weight, certified.weight, rtol=0, atol=ROUNDING)
    assert len(recorder.calls) == Convex().rounds


def test_every_solve_of_convex_is_kept_the_refit_last():
    solutions = Convex(rounds=10).prune(layer_problem(correlated(0), Unstructured(0.5))).solutions
    assert len(solutions) == 4 + 1  # the last problem of every envelope
    assert all(isfinite(s.certificate.gap) for s in solutions)
    assert solutions[-1].status is Status.SOLVED


def test_an_oracle_may_solve_the_path_of_convex():
    problem = layer_problem(correlated(0, m=2, n=6), Unstructured(0.5))
    exact = Convex(solver=Convex.solver_for("scipy"), rounds=5)
    rough = replace(exact, solver=make_solver("fista", tolerance=1e-8, max_iterations=20_000))
    torch.testing.assert_close(exact.prune(problem).weight, rough.prune(problem).weight, rtol=0, atol=1e-4)


def test_a_solver_that_cannot_take_the_path_is_refused():
    with pytest.raises(UnsupportedError, match="ConjugateGradient"):
        Convex(solver=make_solver("cg")).prune(layer_problem(correlated(0), Unstructured(0.5)))


@given(st.sampled_from(("matrix", "row", "2:4")), seeds)
@settings(max_examples=6)
def test_the_scale_of_the_inputs_does_not_change_what_convex_keeps(name, seed):
    layer, scale = correlated(seed), random(seed + 9, 16).exp()
    other = Layer(layer.weight / scale, layer.pruned * scale, layer.pruned * scale)
    pattern = PATTERNS[name]
    first, second = (Convex(damping=0.1).prune(layer_problem(x, pattern)) for x in (layer, other))
    assert torch.equal(first.mask, second.mask)
    torch.testing.assert_close(second.weight * scale, first.weight, rtol=0, atol=1e-6)


def test_admm_may_solve_the_path_of_convex():
    problem = layer_problem(correlated(0, m=16, n=32), Unstructured(0.5))
    by_admm = error(problem, Convex(solver=Convex.solver_for("admm")))
    assert by_admm < error(problem, SparseGPT())
    assert by_admm == pytest.approx(error(problem, Convex()), rel=0.1)
