"""Whole input channels as a constraint."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import Recorder, correlated, error, layer_problem
from strategies import random, seeds
from torch import Tensor

from convexprune._setting_types import make
from convexprune.constraints import Columns, Stacked, parse_pattern
from convexprune.core._group_lasso import GroupLasso
from convexprune.core._moments import Moments
from convexprune.core._penalty import L1
from convexprune.core._quadratic import Quadratic
from convexprune.errors import PatternError, UnsupportedError
from convexprune.pruners import METHODS, PRUNERS, Convex, Damping, LayerProblem, Refitted
from convexprune.pruners._damped import damped
from convexprune.pruners._search import COLUMNS
from convexprune.solvers import Status, make_solver


@given(st.integers(1, 6), st.integers(2, 12), st.sampled_from((0.0, 0.25, 0.5, 0.8)), seeds)
def test_the_columns_of_least_energy_go_in_all_rows(m: int, n: int, sparsity: float, seed: int):
    scores = random(seed, m, n).abs()
    mask = Columns(sparsity).mask(scores)
    energies = scores.square().sum(0).tolist()
    kept = sorted(range(n), key=lambda j: -energies[j])[: n - round(sparsity * n)]
    assert {j for j in range(n) if mask[:, j].all()} == set(kept)
    assert int((~mask).sum()) == Columns(sparsity).zeros(m, n) == m * (n - len(kept))


@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 4), st.sampled_from((0.0, 0.25, 0.5, 0.8)), seeds)
def test_blocks_are_columns_of_a_weight_that_has_them_one_below_another(
    m: int, count: int, block: int, sparsity: float, seed: int
):
    scores, pattern, alone = random(seed, m, count * block).abs(), Columns(sparsity, block=block), Columns(sparsity)
    mask, threshold = pattern.mask(scores), pattern.threshold(scores)
    assert torch.equal(folded(mask, block), alone.mask(folded(scores, block)))
    torch.testing.assert_close(folded(threshold, block), alone.threshold(folded(scores, block)))
    assert int((~mask).sum()) == pattern.zeros(m, count * block) and pattern.violation(scores * mask) == 0
    assert pattern.violation(scores) == round(sparsity * count) * block


def folded(weight: Tensor, block: int) -> Tensor:
    """[m n] as [m * block, n / block]: what was a block of columns is one column."""
    return weight.unflatten(1, (-1, block)).transpose(1, 2).flatten(0, 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), seeds)
def test_blocks_of_columns_add_up_to_the_count_of_the_whole(widths: list[int], seed: int):
    pattern, first, zeros = Columns(0.4), 0, 0
    for width in widths:
        zeros += int((~pattern.mask(random(seed, 2, width).abs(), first)).sum())
        first += width
    assert zeros == pattern.zeros(2, first)


@given(seeds, st.sampled_from((0.0, 0.3, 0.5)))
def test_the_threshold_separates_what_is_kept_from_what_is_not(seed: int, sparsity: float):
    scores, pattern = random(seed, 4, 16), Columns(sparsity)
    mask, threshold = pattern.mask(scores.abs()), pattern.threshold(scores)
    assert (scores.abs()[mask] >= threshold[mask] * (1 - 1e-12)).all()
    assert (scores.abs()[~mask] <= threshold[~mask]).all()


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.whole_only is None])
def test_every_method_removes_whole_columns(method: str):
    for pattern in Columns(0.25), Columns(0.25, block=4):
        problem, pruner = layer_problem(correlated(0), pattern), METHODS[method]()
        if pattern.block > 1 and method == "sparsegpt":
            with pytest.raises(PatternError, match="one after another, and pattern columns:4 25% removes blocks"):
                pruner.require(pattern)
            continue
        pruner.require(pattern)
        weight = pruner.prune(problem).weight
        gone = (weight == 0).all(0).view(-1, pattern.block)
        assert int(gone.all(1).sum()) * pattern.block == int(gone.sum()) == 4 and pattern.violation(weight) == 0


def test_those_that_search_lose_less_than_those_that_look():
    problem = layer_problem(correlated(0, m=16, n=32), Columns(0.5))
    errors = {name: error(problem, PRUNERS[name]()) for name in ("admm", "convex", "wanda", "magnitude")}
    assert max(errors["admm"], errors["convex"]) < 0.8 * errors["wanda"], errors


def test_names_and_what_does_not_fit():
    assert parse_pattern("columns") == Columns(0.5) and parse_pattern("columns", 0.3) == Columns(0.3)
    with pytest.raises(PatternError, match="Leave quota out"):
        parse_pattern("columns", 0.3, "row")
    for sparsity in (0.01, 0.99):
        with pytest.raises(PatternError, match=rf"Sparsity {sparsity} of 4 columns rounds to (0|4)\. Accepted: 0\.25 "):
            Columns(sparsity).check(8, 4)
    assert parse_pattern("columns:64", 0.25) == Columns(0.25, block=64)
    with pytest.raises(PatternError, match="48 columns are no multiple of 64"):
        Columns(0.5, block=64).check(8, 48)
    with pytest.raises(PatternError, match=r"of 1 blocks of 48 columns rounds to 0\. Accepted: none"):
        Columns(0.5, block=48).check(8, 48)
    with pytest.raises(PatternError, match="columns:0 is no block"):
        parse_pattern("columns:0")
    assert not torch.equal(*(Columns(0.5).mask(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).T))


@given(seeds)
def test_the_refit_of_whole_columns_is_least_squares_at_once(seed: int):
    problem = layer_problem(correlated(seed), Columns(0.5))
    pruned = Refitted(PRUNERS["wanda"](), damping=0.0).prune(problem)
    (solution,), kept = pruned.solutions, pruned.mask[0]
    assert solution.iterations == 0 and solution.status is Status.SOLVED
    gram, target = problem.quadratic.gram, problem.weight @ problem.quadratic.gram + problem.quadratic.cross
    expected = torch.linalg.solve(gram[kept][:, kept], target[:, kept].T).T
    torch.testing.assert_close(pruned.weight[:, kept], expected, rtol=1e-8, atol=1e-8)
    assert not pruned.weight[:, ~kept].any()


@settings(max_examples=8)
@given(seeds, st.sampled_from((1, 4)))
def test_the_path_of_one_operator_is_that_of_the_group_lasso(seed: int, block: int):
    """As it is posed: one strength for each column, small where it is clearly kept; some columns vanish on the way."""
    problem, recorder = layer_problem(correlated(seed, n=16 * block), Columns(0.5, block=block)), Recorder()
    pruned = Convex(solver=recorder).prune(problem)
    penalties = [posed.penalty for posed, _, _ in recorder.calls if isinstance(posed.penalty, GroupLasso)]
    assert len(penalties) == len(recorder.calls) == Convex.rounds
    last, strength = recorder.calls[-1][2].weight, torch.as_tensor(penalties[-1].strength)
    assert strength.shape == (16 * block,) and {penalty.block for penalty in penalties} == {block}
    assert block > 1 or (last == 0).all(0).any()
    kept = pruned.mask[0]
    assert float(strength[kept].max()) <= float(strength[~kept].min()) and problem.pattern.violation(pruned.weight) == 0


@settings(max_examples=3)
@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if method.whole_only is None))
@pytest.mark.parametrize("pattern", [Columns(0.5), Columns(0.125), Columns(0.25, block=2)], ids=str)
@given(seed=seeds)
def test_a_stack_of_one_operator_is_pruned_as_the_operator(method: str, pattern: Columns, seed: int):
    """As runs have it. Of the patterns one leaves more choices than are tried, and two leave few."""
    pruner = METHODS[method]()
    if pattern.block > 1 and pruner.one_by_one:
        return
    problem = layer_problem(correlated(seed, m=4, n=16), pattern)
    alone, stacked = pruner.prune(problem), pruner.prune(replace(problem, pattern=Stacked.alike(pattern, (4,))))
    assert torch.equal(alone.weight, stacked.weight) and len(alone.solutions) == len(stacked.solutions)
    assert int((~stacked.mask).sum()) == pattern.zeros(4, 16)


@settings(max_examples=8)
@given(seeds, st.sampled_from((1, 4)), st.sampled_from((None, 0.05)))
def test_few_choices_are_all_tried(seed: int, block: int, damping: float | None):
    """Slowly, by hand: no other choice of as many columns has a lower damped error after the refit."""
    problem = layer_problem(correlated(seed, m=4, n=8 * block), Columns(0.25, block=block))
    pruned = Convex(damping=damping).prune(problem)
    assert pruned.damping is not None and [s.status for s in pruned.solutions] == [Status.SOLVED]
    searched = damped(problem, COLUMNS if damping is None else Damping(damping))
    errors = {kept: float(searched.values(weight).sum()) for kept, weight in every_choice(searched, problem, block)}
    kept = min(errors, key=errors.__getitem__)
    assert pruned.mask.tolist() == [list(kept)] * 4
    weights = dict(every_choice(damped(problem, pruned.damping), problem, block))
    torch.testing.assert_close(pruned.weight, weights[kept])


def every_choice(quadratic: Quadratic, problem: LayerProblem, block: int) -> Iterator[tuple[tuple[bool, ...], Tensor]]:
    """The columns of eight blocks that are kept, without two of these, and the best weight on them."""
    target = problem.weight @ quadratic.gram + quadratic.cross
    for gone in combinations(range(8), 2):
        kept = torch.ones(8, dtype=torch.bool)
        kept[list(gone)] = False
        kept = kept.repeat_interleave(block)
        weight = torch.zeros_like(problem.weight)
        weight[:, kept] = torch.linalg.solve(quadratic.gram[kept][:, kept], target[:, kept].T).T
        yield tuple(kept.tolist()), weight


@settings(max_examples=8)
@given(seeds, st.sampled_from((0, 70)))
def test_what_others_make_up_for_in_the_sample_alone_is_kept(seed: int, choices: int):
    """Two inputs that are alike in the sample, and two of little energy: other texts may tell the first two apart."""
    x = random(seed, 200, 8).float()
    x[:, 1] = x[:, 0] + 0.05 * random(seed + 1, 200).float()
    x[:, 6:] *= 0.3
    weight = (random(seed + 2, 4, 8).sign() + 0.1 * random(seed + 3, 4, 8)).float()
    moments = Moments(8)
    moments.add(x)
    problem = LayerProblem(weight, moments, Columns(0.125))
    one_of_the_alike, of_little_energy = (Convex(choices=choices, damping=d).prune(problem) for d in (0.001, None))
    assert not one_of_the_alike.mask[0, :2].all() and not of_little_energy.mask[0, 6:].all()


def test_operators_of_a_stack_choose_for_themselves():
    recorder = Recorder()
    Convex(solver=recorder).prune(layer_problem(correlated(0), Stacked.alike(Columns(0.5), (3, 5))))
    assert all(isinstance(posed.penalty, L1) for posed, _, _ in recorder.calls)


def test_a_solver_that_does_not_take_the_group_lasso_is_refused_before_any_work():
    with pytest.raises(UnsupportedError, match="does not take the penalty GroupLasso"):
        Convex(solver=make_solver("scipy")).require(Columns(0.5))


def test_the_refit_of_what_next_to_nothing_is_lost_of_is_as_exact():
    """In float32: a step from where the others began, as the weights anew have rounding errors larger than the loss."""
    inputs = random(0, 200, 64).float() * torch.where(torch.arange(64) < 16, 1e-5, 1.0)
    moments = Moments(64)
    moments.add(inputs)
    problem = LayerProblem(random(1, 8, 64).float(), moments, Columns(0.25), 0.0)
    (solution,) = Refitted(PRUNERS["wanda"](), damping=0.0).prune(problem).solutions
    assert solution.status is Status.SOLVED


def test_columns_that_are_known_need_no_iteration_after_their_factorisation():
    """Inputs of sizes as far apart as those of Gemma: a float32 factor of their own Gram matrix is not safe."""
    inputs = random(0, 400, 64).float() * torch.logspace(-2, 2, 64)
    moments = Moments(64)
    moments.add(inputs)
    problem = LayerProblem(random(1, 8, 64).float(), moments, Columns(0.25), 0.0)
    (solution,) = Convex().prune(replace(problem, importance=random(2, 1, 64).square().expand(8, -1))).solutions
    assert (solution.status, solution.iterations) == (Status.SOLVED, 0)


@settings(max_examples=8)
@given(seeds, st.sampled_from(("convex", "admm")), st.sampled_from((1, 2)))
def test_what_the_loss_needs_chooses_the_columns_and_a_refit_their_values(seed: int, method: str, block: int):
    """Each operator of a stack for itself."""
    pruner, pattern = make(METHODS[method], method, {"damping": 0.1}), Stacked.alike(Columns(0.25, block=block), (3, 5))
    problem = layer_problem(correlated(seed, n=8 * block), pattern)
    needs = random(seed + 1, 2, 8).square()
    importance = torch.cat([each.repeat_interleave(block).expand(m, -1) for each, m in zip(needs, (3, 5), strict=True)])
    pruned = pruner.prune(replace(problem, importance=importance))
    kept = needs.argsort(1).argsort(1) >= 2
    expected = torch.cat([each.repeat_interleave(block).expand(m, -1) for each, m in zip(kept, (3, 5), strict=True)])
    assert torch.equal(pruned.mask, expected) and {s.status for s in pruned.solutions} == {Status.SOLVED}
    posed, best = damped(problem, Damping(0.1)), torch.zeros_like(problem.weight)
    target = problem.weight @ posed.gram + posed.cross
    for rows in (slice(0, 3), slice(3, 8)):
        own = expected[rows][0]
        best[rows, own] = torch.linalg.solve(posed.gram[own][:, own], target[rows][:, own].T).T
    assert float(posed.values(pruned.weight).sum()) <= float(posed.values(best).sum()) * (1 + 1e-3)
    few = replace(problem, importance=importance).rows(slice(3, 8), Columns(0.25, block=block))
    assert torch.equal(pruner.prune(few).mask, expected[3:])
