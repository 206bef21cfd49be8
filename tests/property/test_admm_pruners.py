"""ADMM and ALPS against the same iterations written plainly."""

from dataclasses import dataclass, fields, make_dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from pruning_cases import correlated, error, layer_problem
from strategies import seeds

from convexprune._setting_types import Count
from convexprune.constraints import SemiStructured, Stacked, Unstructured
from convexprune.core._penalty import L1
from convexprune.errors import RecipeError, UnsupportedError
from convexprune.pruners import ADMM, ALPS, PRUNERS, Damping, LayerProblem, Refitted, SparseGPT, Wanda
from convexprune.pruners._damped import saliency_coordinates
from convexprune.solvers import AbstractSolver, make_solver

PLAIN_PATTERNS = (Unstructured(0.5), Unstructured(0.7, "row"), SemiStructured(2, 4))
ROUNDING = 1e-7  # the same iterations in another order of operations, float64


def largest(scores: torch.Tensor, pattern) -> torch.Tensor:
    """The scores that the pattern keeps, by sorting."""
    m, n = scores.shape
    if isinstance(pattern, SemiStructured):
        lines, kept = scores.reshape(-1, pattern.group), pattern.kept
    else:
        lines = scores if pattern.quota == "row" else scores.reshape(1, -1)
        kept = lines.shape[1] - pattern.zeros(m, n) // len(lines)
    out = torch.zeros_like(lines)
    for line, found in zip(lines, out, strict=True):
        for j in line.abs().argsort(descending=True)[:kept]:
            found[j] = line[j]
    return out.view_as(scores)


def slow_admm(problem: LayerProblem, pruner: ADMM) -> torch.Tensor:
    """Boyd et al. 2011, sections 3.4.3 and 9.1, with the multiplier itself and every system solved as it comes."""
    assert pruner.damping is not None
    quadratic, scale = saliency_coordinates(problem, Damping(pruner.damping))
    assert quadratic.anchor is not None
    slope = quadratic.cross + quadratic.anchor @ quadratic.gram  # H B = slope is the unconstrained optimum
    identity = torch.eye(len(scale), dtype=scale.dtype)
    kept, multiplier, b, rho = quadratic.anchor, torch.zeros_like(quadratic.anchor), quadratic.anchor, 1.0
    low, high = pruner.stiffnesses
    for t in range(pruner.iterations):
        if t % pruner.every == 0:
            rho = low * (high / low) ** (t / (pruner.iterations - 1))
        b = torch.linalg.solve(quadratic.gram + rho * identity, (slope - multiplier + rho * kept).T).T
        b = pruner.relaxation * b + (1 - pruner.relaxation) * kept
        kept = largest(b + multiplier / rho, problem.pattern)
        multiplier = multiplier + rho * (b - kept)
    return kept / scale


@pytest.mark.parametrize("pattern", PLAIN_PATTERNS, ids=str)
@pytest.mark.parametrize("relaxation", [0.7, 1.0])
@settings(max_examples=5)
@given(seed=seeds)
def test_admm_is_the_textbook_iteration(relaxation, pattern, seed):
    problem = layer_problem(correlated(seed, change=0.3), pattern)
    pruner = ADMM(refit=None, iterations=23, every=4, damping=0.05, relaxation=relaxation)
    expected = slow_admm(problem, pruner)
    found = pruner.prune(problem).weight
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def slow_alps(problem: LayerProblem, pruner: ALPS) -> torch.Tensor:
    """mazumder-lab/ALPS, alps.py, step by step in its own layout (inputs by outputs), with ten plain CG steps."""
    raw = problem.quadratic.gram
    n = len(raw)
    xtx = raw + pruner.damping * raw.diagonal().mean() * torch.eye(n, dtype=raw.dtype)
    norm = xtx.diagonal().sqrt()
    dense = (problem.weight * norm).T
    ytx = ((problem.weight @ xtx + problem.quadratic.cross) / norm).T
    xtx = xtx / norm / norm[:, None]
    identity = torch.eye(n, dtype=raw.dtype)

    def project(b):
        return largest(b.T, problem.pattern).T

    b, v, rho, grown = dense, torch.zeros_like(dense), pruner.rho, False
    d = project(dense)
    before = d == 0
    kept = int((d != 0).sum())
    for i in range(pruner.iterations):
        b = torch.linalg.solve(xtx + rho * identity, ytx - v + rho * d)
        d = project((v + rho * b) / rho)
        v = v + rho * (b - d)
        if (i + 1) % 3:
            continue
        change = int(((d == 0) != before).sum())
        before = d == 0
        if change / kept > 0.1:
            grown, rho = True, rho * 1.3
        elif change / kept > 0.005:
            grown, rho = True, rho * 1.2
        elif change > 0.5 and grown:
            rho *= 1.1
        elif change > 0.5:
            rho, b, d, v = rho / 5, dense, project(dense), torch.zeros_like(dense)
        elif grown:
            break
        else:
            rho /= 5
        if i >= 30 and change / kept < 0.0003:
            break
    b = project(b)
    support = b != 0
    residual = (ytx - xtx @ b) * support
    direction = residual
    for _ in range(10):
        energy = residual.square().sum(0)
        step = energy / (direction * (xtx @ direction)).sum(0)
        b = b + step * direction
        residual = (residual - step * (xtx @ direction)) * support
        direction = residual + residual.square().sum(0) / energy * direction
    return b.T / norm


@pytest.mark.parametrize("pattern", PLAIN_PATTERNS, ids=str)
@pytest.mark.parametrize("rho", [0.1, 300.0])  # the code's default argument, and its command line's: rho falls first
@settings(max_examples=5)
@given(seed=seeds)
def test_alps_is_the_authors_code_step_by_step(rho, pattern, seed):
    problem = layer_problem(correlated(seed, m=8, n=32, change=0.3), pattern)
    refit = make_solver("cg", tolerance=0.0, max_iterations=10)
    pruner = ALPS(rho=rho, refit=refit)
    expected = slow_alps(problem, pruner)
    found = pruner.prune(problem).weight
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def test_alps_prunes_each_operator_of_a_stack_on_its_own_schedule():
    layer, heights = correlated(0, m=12, change=0.3), (4, 8)
    whole = ALPS(refit=None).prune(layer_problem(layer, Stacked.alike(Unstructured(0.5), heights))).weight
    for part, weight in zip(whole.split(heights), layer.weight.split(heights), strict=True):
        alone = ALPS(refit=None).prune(LayerProblem(weight, layer.moments, Unstructured(0.5))).weight
        torch.testing.assert_close(part, alone, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("pattern", PLAIN_PATTERNS, ids=str)
@pytest.mark.parametrize("pruner", [ADMM(damping=1e-3), ALPS()], ids=["admm", "alps"])
def test_admm_and_alps_are_better_than_sparsegpt_and_wanda(pruner, pattern):
    for seed in range(5):
        problem = layer_problem(correlated(seed, m=16, n=32, change=0.3), pattern)
        assert error(problem, pruner) < min(error(problem, SparseGPT()), error(problem, Wanda()))


def test_the_products_of_a_pruner_are_its_iterations_its_envelopes_and_those_of_its_solves():
    pruned = ADMM(iterations=17, every=7).prune(layer_problem(correlated(0), Unstructured(0.5)))
    assert pruned.products == 17 + 3 + pruned.solutions[0].products


@pytest.mark.parametrize(
    "pruner", [Wanda(), SparseGPT(), ADMM(refit=None), ALPS(refit=None)], ids=lambda p: type(p).__name__
)
@settings(max_examples=5)
@given(seed=seeds)
def test_a_refit_keeps_the_support_and_is_optimal_on_it(pruner, seed):
    problem = layer_problem(correlated(seed, change=0.3), Unstructured(0.5))
    plain = pruner.prune(problem)
    tight = make_solver("cg", tolerance=1e-12, max_iterations=500)
    pruned = Refitted(pruner, tight, damping=0.1).prune(problem)
    assert torch.equal(pruned.mask, plain.mask)
    gram = problem.quadratic.gram + 0.1 * torch.diag(problem.quadratic.gram.diagonal())
    slope = problem.quadratic.cross + problem.weight @ gram
    for i, kept in enumerate(pruned.mask):
        expected = torch.linalg.solve(gram[kept][:, kept], slope[i, kept])
        torch.testing.assert_close(pruned.weight[i, kept], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "fistapruner"])
def test_a_refit_lowers_the_error_of_every_baseline(name):
    problem = layer_problem(correlated(0, change=0.3), Unstructured(0.5))
    baseline = PRUNERS[name]()
    assert error(problem, Refitted(baseline, damping=0.0)) < error(problem, baseline)


def test_a_refit_adds_its_solve_and_leaves_the_damping_of_the_search():
    problem = layer_problem(correlated(0), Unstructured(0.5))
    pruned = Refitted(ADMM(refit=None, damping=0.2, iterations=5), damping=0.1).prune(problem)
    assert pruned.damping == Damping(0.2)
    assert pruned.products == 5 + 1 + pruned.solutions[-1].products


@pytest.mark.parametrize("name", PRUNERS)
def test_a_count_below_one_is_refused_before_any_work(name):
    pruner: Any = PRUNERS[name]
    counts = [setting.name for setting in fields(pruner) if setting.type is Count]
    for count in counts:
        with pytest.raises(RecipeError, match=f"{pruner.__name__}: {count}=0: .*greater than or equal to 1"):
            pruner(**{count: 0})
    assert bool(counts) == (name not in ("magnitude", "wanda"))


def test_a_count_is_one_where_annotations_are_postponed():
    own: Any = make_dataclass("Own", [("sweeps", "Count", 1)], bases=(Wanda,), frozen=True)
    with pytest.raises(RecipeError, match=r"Own: sweeps=0: .*greater than or equal to 1"):
        own(sweeps=0)


def test_another_whole_number_may_be_zero():
    @dataclass(frozen=True)
    class Seeded(Wanda):
        seed: int = 0

    assert Seeded().seed == 0


def test_a_refit_that_takes_no_support_is_refused():
    with pytest.raises(UnsupportedError, match="GradientDescent does not take the penalty Support"):
        Refitted(Wanda(), GradientDescent())


@dataclass(frozen=True)
class GradientDescent(AbstractSolver):
    """A solver of one penalty only."""

    @property
    def penalties(self):
        return (L1,)

    def solve(self, problem, start=None):
        raise AssertionError("it was refused")
