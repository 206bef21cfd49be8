"""Every penalty: what its methods say of each other, and of CVXPY's answer; and penalties that users write."""

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_layer, random, seeds
from torch import Tensor

from convexprune import (
    L1,
    MCP,
    SCAD,
    AbstractPenalty,
    Blocks,
    ElasticNet,
    GroupLasso,
    NuclearNorm,
    Problem,
    Quadratic,
    ReverseHuber,
    RowGroups,
    Status,
    Support,
    TotalVariation,
    certify,
    make_solver,
    problems,
)  # fmt: skip
from convexprune.core._abstract_penalty import Scaled
from convexprune.errors import ProblemError, UnsupportedError

M, N = 3, 12
THIRDS = torch.arange(N) // 3
PENALTIES = {
    "L1": lambda s: L1(random(s, M, N).abs()),
    "support": lambda s: Support(random(s, M, N) > 0),
    "elastic net": lambda s: ElasticNet(0.2, random(s, N).abs()),
    "non-negative": lambda s: ElasticNet(0.2, lower=0),
    "box": lambda s: ElasticNet(lower=-0.5, upper=random(s, N).abs()),
    "all of that": lambda s: ElasticNet(
        random(s, N).abs(), random(s, N).clamp_min(0), -random(s, N).abs(), random(s, M, N).abs()
    ),
    "reverse Huber": lambda s: ReverseHuber(random(s, N).abs() + 0.1, random(s, M, N).abs()),
    "columns": lambda s: GroupLasso(random(s, N).abs()),
    "blocks of columns": lambda s: GroupLasso(0.7, block=3),
    "groups": lambda s: RowGroups(THIRDS, random(s, 4).abs()),
    "sparse groups": lambda s: RowGroups(THIRDS, 0.5, 0.2),
    "groups of each row": lambda s: RowGroups(random(s, M, N).argsort(1) % 3, 0.5, random(s, N).clamp_min(0)),
    "groups that rows lack": lambda s: RowGroups(
        (random(s, M, N).argsort(1) % 3).clamp_max(2 - torch.arange(M)[:, None]), random(s, 3).abs()
    ),
    "total variation": lambda s: TotalVariation(0.6),
    "fused": lambda s: TotalVariation(random(s, M, 1).abs(), 0.2),
    "nuclear": lambda s: NuclearNorm(1.1),
    "sparse + low rank": lambda s: Blocks(((L1(0.2), 6), (NuclearNorm(0.7), 6))),
    "scaled": lambda s: Scaled(RowGroups(THIRDS, 0.5, 0.2), 2.0),
}
CONCAVE = {
    "MCP": lambda s: MCP(random(s, M, N).abs(), 1.5),
    "MCP beyond the step": lambda s: MCP(0.5, 0.3),
    "SCAD": lambda s: SCAD(random(s, N).abs()),
    "SCAD beyond the step": lambda s: SCAD(0.5, 2.1),
}


@pytest.mark.parametrize("name", PENALTIES | CONCAVE)
@settings(max_examples=6)
@given(seed=seeds)
def test_a_penalty_does_what_it_says(name: str, seed: int):
    found = list(problems.check_penalty((PENALTIES | CONCAVE)[name](seed), (M, N), seed))
    assert len(found) >= 4 and all(each.passed for each in found), [each for each in found if not each.passed]


@pytest.mark.parametrize("tokens", [40, 7])
@pytest.mark.parametrize("name", PENALTIES)
def test_fista_and_admm_certify_it_and_cvxpy_agrees(name: str, tokens: int):
    x = random(1, tokens, N) @ (torch.eye(N) + 0.3 * random(2, N, N))
    quadratic = Quadratic.least_squares(x, x @ random(3, N, M) + 0.3 * random(4, tokens, M))
    problem = Problem(quadratic, PENALTIES[name](0))
    values = []
    for solver in ("fista", "admm"):
        solution = make_solver(solver, tolerance=1e-7, max_iterations=20_000).solve(problem)
        assert solution.status is Status.SOLVED, solver
        values.append(solution.certificate.primal)
    if name != "scaled":
        oracle = make_solver("cvxpy").solve(problem)
        assert values == pytest.approx([oracle.certificate.primal] * 2, rel=2e-6)
        assert oracle.certificate.dual <= min(values) and oracle.certificate.relative_gap < 1e-4


@pytest.mark.parametrize("name", PENALTIES)
@settings(max_examples=3)
@given(seed=seeds)
def test_no_certificate_is_below_the_true_gap(name: str, seed: int):
    quadratic = make_layer("rank deficient" if seed % 2 else "full rank", M, N, seed).quadratic()
    problem = Problem(quadratic, PENALTIES[name](seed))
    best = make_solver("admm", tolerance=1e-9, max_iterations=2000).solve(problem)
    for radius in (1e-3, 0.3):
        near = problem.penalty.prox(best.weight + radius * random(seed + 1, M, N), 1e-9)
        certificate = certify(problem, near)
        assert certificate.gap >= (certificate.primal - best.certificate.primal) * (1 - 1e-6) - 1e-9


@settings(max_examples=20)
@given(seeds, st.sampled_from((0.01, 0.3)))
def test_on_few_tokens_total_variation_is_proven_in_float64(seed: int, strength: float):
    problem = Problem(Quadratic.least_squares(random(seed, 3, 6), random(seed + 1, 3, 2)), TotalVariation(strength))
    solution, oracle = make_solver("fista", max_iterations=20_000).solve(problem), make_solver("cvxpy").solve(problem)
    assert solution.status is Status.SOLVED and oracle.certificate.relative_gap < 1e-6
    for radius in (1e-6, 1e-2, 1.0):
        certificate = certify(problem, oracle.weight + radius * random(seed + 2, 2, 6))
        assert certificate.dual <= oracle.certificate.primal * (1 + 1e-9)


def bounded(dtype: torch.dtype) -> Quadratic:
    """Inputs of sizes .1 to 10, whose weights would like to be 2."""
    x = random(0, 40, 6) * torch.logspace(-1, 1, 6, dtype=torch.float64)
    return Quadratic.least_squares(x.to(dtype), (2 * x[:, :4].sum(1, keepdim=True) + random(1, 40, 2)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["fista", "admm", "cvxpy"])
def test_the_answer_for_blocks_is_inside_their_bounds(name: str, dtype: torch.dtype):
    inner = Blocks(((ElasticNet(0.01, lower=-0.1, upper=0.3), 2), (L1(torch.tensor([inf])), 1)))
    penalty = Blocks(((inner, 3), (Support(torch.tensor([True, False, True])), 3)))
    solution = make_solver(name, tolerance=1e-4).solve(Problem(bounded(dtype), penalty))
    assert solution.certificate.primal < inf
    assert bool((solution.weight[:, :2].double() <= 0.3).all()) and not bool(solution.weight[:, [2, 4]].any())


@pytest.mark.parametrize("blocks", [False, True])
def test_a_weight_on_a_bound_is_certified_in_float32_as_in_float64(blocks: bool):
    penalty = ElasticNet(0.01, lower=-0.1, upper=0.3)
    stored, exact = (
        Problem(bounded(dtype), Blocks(((penalty, 6),)) if blocks else penalty)
        for dtype in (torch.float32, torch.float64)
    )
    solution = make_solver("admm").solve(stored)
    assert solution.status is Status.SOLVED
    beyond = solution.weight.where(solution.weight < 0.299, 0.3)  # of float32, which is above
    sure = certify(exact, beyond.double().clamp(max=0.3))
    assert certify(stored, beyond).gap <= sure.gap + 2e-5 * sure.primal


@pytest.mark.parametrize("penalty", [TotalVariation(0.1), RowGroups(torch.arange(6) // 2, 0.1), ElasticNet(0.1)])
def test_on_few_tokens_in_float32_nothing_is_proven_of_penalties_in_doubt(penalty: AbstractPenalty):
    quadratic = Quadratic.least_squares(random(0, 3, 6), random(1, 3, 2))
    solution = make_solver("fista", max_iterations=20_000).solve(Problem(quadratic, penalty))
    assert solution.status is Status.SOLVED
    single = Quadratic(quadratic.gram.float(), quadratic.cross.float(), quadratic.energy.float())
    assert 0.9 < certify(Problem(single, penalty.to(torch.float32)), solution.weight.float()).relative_gap < 1.1


@pytest.mark.parametrize("name", CONCAVE)
def test_without_convexity_the_weight_is_stationary_and_nothing_is_certified(name: str):
    quadratic = make_layer("full rank", M, N, 0).quadratic()
    problem = Problem(quadratic, CONCAVE[name](0))
    solution = make_solver("fista", tolerance=1e-6, max_iterations=20_000).solve(problem)
    assert solution.status is Status.STATIONARY and "not convex" in str(solution)
    assert solution.certificate.gap == inf and solution.certificate.kkt_residual <= 1e-6
    assert problem.value(solution.weight) <= problem.value(problem.penalty.prox(solution.weight + 1e-3, 0.0)) + 1e-9
    assert make_solver("fista", tolerance=1e-6, max_iterations=2).solve(problem).status is Status.ITERATION_LIMIT


def test_a_large_reach_is_l1():
    problem = Problem(make_layer("full rank", M, N, 0).quadratic(), MCP(0.1, 1e9))
    weight = make_solver("fista", tolerance=1e-5, max_iterations=20_000).solve(problem).weight
    assert certify(Problem(problem.quadratic, L1(0.1)), weight).relative_gap < 1e-4


def test_a_weight_is_sparse_plus_low_rank():
    n, rank = 10, 1
    low, sparse = random(0, 8, rank) @ random(1, rank, n), random(2, 8, n) * (random(3, 8, n) > 1.3) * 3
    x = random(4, 200, n)
    quadratic = Quadratic.least_squares(x, x @ (low + sparse).T + 0.01 * random(5, 200, 8)).repeated(2)
    parts = ((L1(0.05), n), (NuclearNorm(0.15), n))
    solution = make_solver("fista", tolerance=1e-6, max_iterations=20_000).solve(Problem(quadratic, Blocks(parts)))
    assert solution.status is Status.SOLVED
    first, second = solution.weight.split(n, 1)
    assert int((torch.linalg.svdvals(second) > 1e-6).sum()) <= 3
    assert float((first + second - low - sparse).norm() / (low + sparse).norm()) < 0.1


class Lengths(AbstractPenalty):
    """Three methods: a price of 0.3 on the length of each row."""

    def values(self, weight: Tensor) -> Tensor:
        return 0.3 * weight.norm(dim=1)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        return weight * (1 - 0.3 * step / weight.norm(dim=1, keepdim=True).clamp_min(0.3 * step + 1e-300))

    def dual_scale(self, dual: Tensor) -> Tensor:
        return 0.3 / dual.norm(dim=1)


def test_three_methods_make_a_penalty():
    assert all(each.passed for each in problems.check_penalty(Lengths()))
    problem = Problem(make_layer("full rank", M, N, 0).quadratic(), Lengths())
    solution = make_solver("fista", tolerance=1e-8, max_iterations=20_000).solve(problem)
    groups = Problem(problem.quadratic, RowGroups(torch.zeros(N, dtype=torch.long), 0.3))
    assert solution.status is Status.SOLVED
    assert solution.certificate.primal == pytest.approx(make_solver("cvxpy").solve(groups).certificate.primal, rel=1e-6)
    with pytest.raises(UnsupportedError, match="Lengths"):
        make_solver("cvxpy").solve(problem)


def with_fault(name: str, method) -> AbstractPenalty:
    return type("Faulty", (Lengths,), {name: method})()


@pytest.mark.parametrize(
    ("penalty", "found"),
    [
        (with_fault("prox", lambda self, weight, step: 0.9 * Lengths.prox(self, weight, step)), "prox is least"),
        (with_fault("values", lambda self, weight: 0.2 * weight.norm(dim=1)), "prox is least"),
        (with_fault("dual_scale", lambda self, dual: 0.31 / dual.norm(dim=1)), "dual_scale is inside"),
        (with_fault("dual_scale", lambda self, dual: 0.2 / dual.norm(dim=1)), "dual_scale is the largest"),
        (with_fault("subgradient", lambda self, weight, dual: weight), "subgradient is one"),
        (with_fault("project", lambda self, dual: dual), "project is inside"),
        (with_fault("scaled", lambda self, scale: self), "scaled is the same function"),
        (with_fault("values", lambda self, weight: -Lengths.values(self, weight)), "values are not negative"),
    ],
)
def test_a_fault_of_a_penalty_is_found(penalty: AbstractPenalty, found: str):
    assert found in [each.name for each in problems.check_penalty(penalty) if not each.passed]


def huber(self: AbstractPenalty, weight: Tensor) -> Tensor:
    return torch.where(weight.abs() < 1, weight.square() / 2, weight.abs() - 0.5).sum(1)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("values", [lambda self, weight: weight.square().sum(1), huber])
def test_a_penalty_that_is_no_norm_needs_its_conjugate(values, size: float):
    cross = size * random(0, M, N)
    quadratic = Quadratic(torch.eye(N).to(cross), cross, cross.square().sum(1))
    with pytest.raises(ProblemError, match=r"Faulty is no norm.*conjugate"):
        Problem(quadratic, with_fault("values", values))


def test_a_multiple_of_a_penalty_does_not_fit_where_the_penalty_does_not():
    multiple = Scaled(L1(torch.ones(N + 1)), 1.0, 2.0)
    with pytest.raises(ProblemError, match="broadcast"):
        Problem(make_layer("full rank", M, N, 0).quadratic(), multiple)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ElasticNet(-1.0),
        lambda: ElasticNet(1.0, inf),
        lambda: ElasticNet(1.0, lower=0.1),
        lambda: ElasticNet(1.0, upper=torch.tensor([-1.0])),
        lambda: RowGroups(torch.tensor([0.0, 1.0]), 1.0),
        lambda: RowGroups(torch.tensor([-1, 0]), 1.0),
        lambda: RowGroups(torch.tensor([0, 1, 2]), torch.ones(2)),
        lambda: Problem(Quadratic(torch.eye(3), torch.zeros(1, 3), torch.zeros(1)), RowGroups(torch.arange(2), 1.0)),
        lambda: Problem(Quadratic(torch.eye(3), torch.zeros(1, 3), torch.zeros(1)), GroupLasso(1.0, block=2)),
        lambda: Problem(Quadratic(torch.eye(3), torch.zeros(1, 3), torch.zeros(1)), Blocks(((L1(1.0), 2),))),
        lambda: TotalVariation(torch.ones(2)),
        lambda: TotalVariation(-1.0),
        lambda: NuclearNorm(torch.ones(2)),  # pyright: ignore[reportArgumentType]
        lambda: Blocks(()),
        lambda: MCP(1.0, 0.0),
        lambda: SCAD(1.0, 2.0),
        lambda: SCAD(-1.0),
    ],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ProblemError):
        make()
