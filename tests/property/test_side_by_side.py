"""Problems side by side against the same problems one by one: the slow twin of every step that is batched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from counting import counted, each
from hypothesis import given
from hypothesis import strategies as st
from pruning_cases import correlated, sampled_bounds
from strategies import random, seeds
from torch import Tensor

from convexprune._device.precision import FORMATS, Format, add_product, bare_product, product, solving_in
from convexprune._layerwise.statistics import SOLVED, at_once, many_at_once
from convexprune._layerwise.steps.measure import sampled_bounds_of_all
from convexprune.constraints import Columns, Constraint, SemiStructured, Stacked, Unstructured
from convexprune.constraints._coded import Coded
from convexprune.constraints._combined import Quantized
from convexprune.core._certificate import certify, certify_each
from convexprune.core._moments import Moments
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.core._side_by_side import SideBySide
from convexprune.pruners import ADMM, AbstractPruner, Convex, Damping, LayerProblem, SparseGPT
from convexprune.pruners._search import Found
from convexprune.solvers._base import Status
from convexprune.solvers._cg import ConjugateGradient
from convexprune.solvers._fista import FISTA

M, N, COUNT = 8, 16, 3
ROUNDING = 1e-10  # float64: the order of sums may differ
PATTERNS: dict[str, Constraint] = {
    "matrix": Unstructured(0.5), "row": Unstructured(0.5, "row"), "2:4": SemiStructured(2, 4),
    "stack": Stacked.alike(Unstructured(0.6), (4, 4)),
    "uneven": Stacked((Unstructured(0.7), SemiStructured(1, 4)), (6, 2)),
    "quantized": Quantized(SemiStructured(2, 4), Coded(3.0)),
}  # fmt: skip


def close(actual: Tensor, expected: Tensor, relative: float = ROUNDING) -> None:
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * max(1.0, float(expected.abs().max())))


def posed(seed: int, pattern: Constraint, dead: int = 0, dtype: torch.dtype = torch.float64) -> LayerProblem:
    """A problem with two halves; its first `dead` inputs are always zero."""
    layer = correlated(seed, M, N, change=0.0 if dead else 0.2)
    tokens = layer.pruned.clone()
    tokens[:, :dead] = 0
    halves = Moments(N, dtype), Moments(N, dtype)
    for half, part in zip(halves, tokens.to(dtype).chunk(2), strict=True):
        half.add(part)
    moments = Moments(N, dtype)
    moments.add(tokens.to(dtype), None if dead else layer.dense.to(dtype))
    return LayerProblem(layer.weight.to(dtype), moments, pattern, folds=halves)


def quadratics(seed: int, tokens: int | None = None) -> list[Quadratic]:
    return [correlated(seed + i, M, N, 0.2, tokens).quadratic() for i in range(COUNT)]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("pruner", [Convex(), ADMM()], ids=lambda pruner: type(pruner).__name__)
def test_what_is_pruned_side_by_side_is_what_is_pruned_alone(pruner: AbstractPruner, name: str):
    problems = [posed(i, PATTERNS[name], dead=3 * (i == 1)) for i in range(COUNT)]
    alone, together = [pruner.prune(each) for each in problems], pruner.prune_all(problems)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.mask, other.mask)
        close(other.weight, one.weight, 1e-8)
        assert other.damping == one.damping and other.products == one.products
        for mine, theirs in zip(other.solutions, one.solutions, strict=True):
            assert mine.status == theirs.status and mine.iterations == theirs.iterations
            assert mine.certificate.primal == pytest.approx(theirs.certificate.primal, rel=1e-8)
            assert mine.certificate.gap == pytest.approx(theirs.certificate.gap, rel=1e-5)
            assert mine.certificate.kkt_residual == pytest.approx(theirs.certificate.kkt_residual, rel=1e-5)


def test_errors_are_the_same_in_float32():
    problems = [posed(i, PATTERNS["stack"], dtype=torch.float32) for i in range(COUNT)]
    for problem, edit in zip(problems, Convex().prune_all(problems), strict=True):
        error, expected = (float(problem.squared_error(e.weight).sum()) for e in (edit, Convex().prune(problem)))
        assert error == pytest.approx(expected, rel=1e-4)


def test_each_problem_has_its_own_pattern():
    patterns = [Unstructured(0.3), Unstructured(0.3), SemiStructured(2, 4), Unstructured(0.7)]
    problems = [posed(i, pattern) for i, pattern in enumerate(patterns)]
    for problem, edit in zip(problems, Convex().prune_all(problems), strict=True):
        assert torch.equal(edit.mask, Convex().prune(problem).mask)


@given(seeds, st.sampled_from([None, 4]))
def test_a_quadratic_of_many_says_what_each_says(seed: int, tokens: int | None):
    each = quadratics(seed, tokens)
    together, weight, before = SideBySide.of(each), random(seed, COUNT * M, N), random(seed + 1, COUNT * M, N)
    pairs = list(zip(each, together.parts, strict=True))

    def agrees(say: Callable[[Quadratic, Tensor, Tensor], Tensor], whole: Quadratic = together) -> None:
        expected = torch.cat([say(q, weight[rows], before[rows]) for q, rows in pairs])
        close(say(whole, weight, before), expected, 1e-8)

    agrees(lambda q, v, _: q.residual(v))
    agrees(lambda q, v, _: q.values(v))
    agrees(lambda q, v, b: q.residual_after(q.residual(b), b, v))
    agrees(lambda q, v, _: q.envelope(0.7).residual(v))
    agrees(lambda q, v, _: q.envelope(0.7).values(v))
    agrees(lambda q, v, _: v * q.scale())
    agrees(lambda q, v, _: q.scaled(q.scale()).residual(v))
    agrees(lambda q, v, _: q.unit_free[0].residual(v) * q.unit_free[1])
    agrees(lambda q, v, _: v * q.dead)
    agrees(lambda q, v, _: v * q.norm)
    agrees(lambda q, v, _: q.rounding)
    agrees(lambda q, v, _: (q.residual(v) * 0 + q.inverse_form(v)[:, None]).nan_to_num(posinf=-1))
    agrees(lambda q, v, _: q.envelope(0.7).inverse_form(v).nan_to_num(posinf=-1))
    close(
        torch.tensor(together.totals(weight[:, 0])), torch.tensor([float(weight[rows, 0].sum()) for _, rows in pairs])
    )
    assert together.is_well_conditioned == all(q.is_well_conditioned for q in each)


def penalty(name: str, seed: int) -> AbstractPenalty:
    mask = random(seed + 9, COUNT * M, N) > 0
    return {"L1": L1(random(seed, COUNT * M, N).abs()), "one strength": L1(0.3), "Support": Support(mask)}[name]


@given(
    seeds, st.sampled_from(["L1", "one strength", "Support"]), st.booleans(), st.sampled_from([None, 4]), st.booleans()
)
def test_certificates_are_those_of_each(seed: int, name: str, precise: bool, tokens: int | None, finite: bool):
    each, penalties = quadratics(seed, tokens), penalty(name, seed)
    together = SideBySide.of(each)
    problem = Problem(together, penalties)
    weight = penalties.prox(random(seed + 3, COUNT * M, N), 0.1)
    if not finite:
        weight[M, 0] = torch.inf
    found = certify_each(problem, weight, precise)
    for q, rows, mine in zip(each, together.parts, found, strict=True):
        theirs = certify(Problem(q, penalties.rows(rows)), weight[rows], precise)
        assert mine.primal == pytest.approx(theirs.primal, rel=1e-9)
        assert mine.gap == pytest.approx(theirs.gap, rel=1e-6, abs=1e-9 * theirs.primal)
        assert mine.kkt_residual == pytest.approx(theirs.kkt_residual, rel=1e-6)


def test_a_certificate_of_each_bounds_the_distance_to_its_optimum():
    together = SideBySide.of(quadratics(5))
    penalties = L1(random(5, COUNT * M, N).abs())
    certificates = certify_each(Problem(together, penalties), random(6, COUNT * M, N))
    for q, rows, certificate in zip(together.blocks, together.parts, certificates, strict=True):
        best = FISTA(tolerance=1e-10).solve(Problem(q, penalties.rows(rows))).certificate
        assert certificate.dual <= best.primal <= certificate.primal


def test_a_refit_ends_for_each_problem_where_it_would_end_alone():
    each = quadratics(0)
    gram = torch.eye(N, dtype=torch.float64) + each[1].gram / each[1].lipschitz  # a few iterations solve it
    each[1] = Quadratic(gram, each[1].cross, 1e3 * each[1].energy, each[1].anchor, checked=False)
    together, mask = SideBySide.of(each), random(1, COUNT * M, N) > 0
    solver = ConjugateGradient(check_every=1, scale=False)
    found = solver.solve(Problem(together, Support(mask)), torch.zeros(COUNT * M, N, dtype=torch.float64))
    alone = [
        solver.solve(Problem(q, Support(mask[rows])), torch.zeros(M, N, dtype=torch.float64))
        for q, rows in zip(each, together.parts, strict=True)
    ]
    assert [part.iterations for part in found.parts] == [one.iterations for one in alone]
    assert found.parts[1].iterations < min(found.parts[0].iterations, found.parts[2].iterations)
    for part, one in zip(found.parts, alone, strict=True):
        close(part.weight, one.weight)
        assert part.status == one.status == Status.SOLVED
    assert found.iterations == max(one.iterations for one in alone)
    assert found.certificate.gap == pytest.approx(sum(part.certificate.gap for part in found.parts))


@pytest.mark.parametrize("format", FORMATS)
def test_products_with_several_matrices_are_those_with_each(format: Format):
    a, b, total = random(0, 6, 5).float(), random(1, 2, 5, 4).float(), random(2, 6, 4).float()
    with solving_in(format):
        expected = torch.cat([product(a[:3], b[0]), product(a[3:], b[1])])
        close(product(a, b), expected, 1e-6)
        close(add_product(total, a, b, alpha=-2), total - 2 * expected, 1e-6)
    close(bare_product(a.bfloat16(), b.bfloat16()).float(), torch.cat([a[:3] @ b[0], a[3:] @ b[1]]), 2e-2)


@given(seeds, st.sampled_from(sorted(PATTERNS)), st.booleans())
def test_masks_and_thresholds_of_operators_in_a_row_are_those_of_each(seed: int, name: str, ties: bool):
    stack = Stacked.of([(PATTERNS[name], M)] * COUNT + [(Unstructured(0.25), M)])
    scores = random(seed, (COUNT + 1) * M, N).abs()
    scores = scores.round() if ties else scores
    parts = stack.parts(len(scores))
    assert torch.equal(stack.mask(scores), torch.cat([own.mask(scores[rows]) for rows, own in parts]))
    expected = torch.cat([own.threshold(scores[rows]).expand_as(scores[rows]) for rows, own in parts])
    assert torch.equal(stack.threshold(scores).expand_as(scores), expected)


@pytest.mark.parametrize("name", ["matrix", "row", "2:4", "stack", "uneven"])
@pytest.mark.parametrize("singular", [False, True])
def test_bounds_side_by_side_are_those_of_each(name: str, singular: bool):
    problems = [posed(i, PATTERNS[name], dead=3 * (i == 1)) for i in range(COUNT)]
    edits = Convex(rounds=4).prune_all(problems)
    factors = [None, torch.linspace(0.5, 2, M), None]
    damping = Damping(0.0 if singular else 0.06)
    if singular:
        few = correlated(9, M, N, tokens=4)
        problems[2] = LayerProblem(few.weight, few.moments, PATTERNS[name])
    stacks = [(p, edit.weight, damping, own) for p, edit, own in zip(problems, edits, factors, strict=True)]
    for stack, together in zip(stacks, sampled_bounds_of_all(stacks, 2), strict=True):
        alone = sampled_bounds(stack[0], stack[1], 2, stack[2], stack[3])
        for one, other in zip(alone, together, strict=True):
            assert one is not None and other is not None and other == pytest.approx(one, rel=1e-6)
            assert other["lower"] > 0 or singular


def kernels_of_bounds(stacks: Sequence[tuple[LayerProblem, Tensor, Damping, Tensor | None]]) -> int:
    return counted(lambda: sampled_bounds_of_all(stacks, 2), compiled=True)["dispatched"]


def test_bounds_of_many_operators_take_fewer_kernels_each():
    problems = [posed(i, Unstructured(0.5)) for i in range(8)]
    stacks = [(p, p.weight * p.pattern.mask(p.weight.abs()), Damping(0.06), None) for p in problems]
    one, many = kernels_of_bounds(stacks[:1]), kernels_of_bounds(stacks)
    assert one < 1100 and many < 0.55 * 8 * one


def kernels(problems: list[LayerProblem], rounds: int = 60, pruner: AbstractPruner | None = None) -> int:
    pruner = pruner or Convex(rounds=rounds)
    return counted(lambda: pruner.prune_all(problems), compiled=True)["dispatched"]


def test_many_problems_take_about_as_many_kernels_as_one():
    problems = [posed(i, PATTERNS["stack"], dtype=torch.float32) for i in range(8)]
    for problem in problems:
        _ = problem.quadratic, problem.energy
    one, many = kernels(problems[:1]), kernels(problems)
    assert (8 * one, many) == (pytest.approx(15_200, rel=0.1), pytest.approx(2_880, rel=0.1))
    one, many = kernels(problems[:1], pruner=ADMM()), kernels(problems, pruner=ADMM())
    assert many < 0.25 * 8 * one
    a_round = [(kernels(p, 24) - kernels(p, 16)) / 8 for p in (problems[:1], problems)]
    assert a_round[1] <= 1.5 * a_round[0]


@pytest.mark.parametrize("name", ["matrix", "2:4", "stack"])
def test_a_round_of_many_waits_for_nothing(name: str):
    problems = [posed(i, PATTERNS[name]) for i in range(COUNT)]
    assert all(problem.typical_energy > 0 for problem in problems)  # what is read once is known from here on

    def path(rounds: int) -> Callable[[], object]:
        return lambda: Convex(rounds=rounds, refit=None).prune_all(problems)

    found = each(path(40), path(20), 20, size=COUNT * M * N, long=COUNT * M * N)
    assert (found["reads"], found["products"]) == (0, 1)


@dataclass(frozen=True)
class Other(Convex):
    """Searches in a way of its own."""

    def search(self, quadratic: Quadratic, pattern: Constraint) -> Found:
        assert not isinstance(quadratic, SideBySide)
        return super().search(quadratic, pattern)


@pytest.mark.parametrize(
    "pruner", [Other(), Convex(solver=FISTA(max_iterations=3)), Convex(refit=FISTA()), SparseGPT()], ids=repr
)
def test_what_cannot_be_batched_is_pruned_one_by_one(pruner: AbstractPruner):
    problems = [posed(i, Unstructured(0.5)) for i in range(2)]
    for problem, edit in zip(problems, pruner.prune_all(problems), strict=True):
        assert torch.equal(edit.weight, pruner.prune(problem).weight)


@pytest.mark.parametrize("pattern", [Columns(0.5), Unstructured(0.0)], ids=str)
def test_whole_columns_and_nothing_at_all_are_pruned_one_by_one(pattern: Constraint):
    problems = [posed(0, pattern), posed(1, Unstructured(0.5))]
    for problem, edit in zip(problems, Convex().prune_all(problems), strict=True):
        assert torch.equal(edit.weight, Convex().prune(problem).weight)
    assert Convex().prune_all([]) == []


def test_problems_are_side_by_side_on_a_gpu_only():
    gpu, host, shape = torch.device("cuda"), torch.device("cpu"), (1536, 2048)
    assert at_once(shape, Convex(), host) == at_once(shape, SparseGPT(), gpu) == 1
    assert at_once(shape, Convex(), gpu) == many_at_once(*shape) == SOLVED // (1536 * 2048 + 2048**2) == 4
    assert many_at_once(8192, 28672) == 1
