"""Problems that are solved in one call, and parts of a problem that leave it: answers are those without both."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from counting import each
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, make_layer, random, seeds

from convexprune import (
    L1,
    ElasticNet,
    GroupLasso,
    Problem,
    Quadratic,
    Status,
    Support,
    certify,
    make_solver,
    path,
    solve,
    solve_all,
)
from convexprune.core._side_by_side import SideBySide, joined
from convexprune.solvers import _iterative
from convexprune.solvers._fista import FISTA
from convexprune.solvers._shrink import Shrink

M, N, COUNT = 3, 8, 4
TIGHT = {"tolerance": 1e-8, "max_iterations": 50_000}


def batch(seed: int, one_gram: bool, kind: str = "full rank") -> list[Problem]:
    quadratics = [make_layer(kind, M, N, seed + i).quadratic().at(None) for i in range(COUNT)]
    if one_gram:
        targets = [q.cross for q in quadratics]
        shared = quadratics[0]
        images = [random(seed + i, M, N) for i in range(COUNT)]  # targets that the inputs reach, and noise
        crosses = [weight @ shared.gram for weight in images]
        energies = [
            (w * c).sum(1) + target.square().sum(1) for w, c, target in zip(images, crosses, targets, strict=True)
        ]
        quadratics = [Quadratic(shared.gram, c, e) for c, e in zip(crosses, energies, strict=True)]
        gram = quadratics[0].gram
        quadratics = [Quadratic(gram, q.cross, q.energy, checked=False) for q in quadratics]
    shares = (0.5, 0.1, 0.02, 0.1)
    return [
        Problem(q, L1(share * float((q.cross / q.scale()).abs().max()) * q.scale()))
        for q, share in zip(quadratics, shares, strict=True)
    ]


@pytest.mark.parametrize("one_gram", [True, False])
@pytest.mark.parametrize("name", ["auto", "fista", "admm", "working-set", "sklearn", "cvxpy"])
@settings(max_examples=2, deadline=None)
@given(seeds)
def test_each_of_a_batch_is_solved_and_certified_as_if_alone(name: str, one_gram: bool, seed: int):
    problems = batch(seed, one_gram)
    given = {} if name == "cvxpy" else TIGHT
    for problem, solution in zip(problems, solve_all(problems, name, **given), strict=True):
        alone = solve(problem, "admm", **TIGHT)
        assert solution.status is Status.SOLVED
        assert solution.certificate.relative_gap <= (1e-4 if name == "cvxpy" else 1e-8)
        assert solution.certificate.gap == pytest.approx(certify(problem, solution.weight).gap, rel=1e-3, abs=1e-13)
        assert solution.certificate.primal == pytest.approx(
            alone.certificate.primal, rel=1e-5 if name == "cvxpy" else 3e-8
        )


def test_a_list_of_all_kinds_comes_back_in_order_in_its_own_arrays():
    one = batch(0, True)
    x = random(5, 30, 6).numpy()
    flat = [Problem(Quadratic.least_squares(x, x[:, i], intercept=True), L1(0.1)) for i in range(2)]
    groups = Problem(one[0].quadratic, GroupLasso(0.1))
    support = Problem(one[0].quadratic, Support(random(0, M, N) > 0))
    problems = [flat[0], groups, one[0], support, flat[1], one[1], Problem(one[2].quadratic, ElasticNet(0.1, 0.2))]
    solutions = solve_all(problems, starts=[None] * 3 + [torch.zeros(M, N)] + [None] * 3)
    for i, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
        assert isinstance(solution.weight, np.ndarray) == (i in (0, 4)) == isinstance(solution.intercept, float)
        assert solution.certificate.primal == pytest.approx(problem.value(solution.weight), rel=1e-9)
        assert solution.status is Status.SOLVED and solution.solver
    assert solve_all([]) == []


@pytest.mark.parametrize("one_gram", [True, False])
def test_a_batch_meets_the_tolerance_problem_by_problem(one_gram: bool):
    problems = batch(1, one_gram)
    problems[1] = Problem(1e-6 * problems[1].quadratic, problems[1].penalty.times(1e-6))  # hidden in the sum of all
    if one_gram:
        q = problems[1].quadratic
        problems[1] = Problem(Quadratic(problems[0].quadratic.gram, q.cross, q.energy * 1e-3, checked=False), L1(1e-4))
    whole = joined(problems)
    assert whole is not None and isinstance(whole.quadratic, SideBySide) == (not one_gram)
    for name in ("fista", "admm"):
        for part in make_solver(name, **TIGHT).solve(whole).each:
            assert part.certificate.relative_gap <= 1e-8


@pytest.mark.parametrize("one_gram", [True, False])
def test_anchors_and_rounding_errors_stay_in_a_batch(one_gram: bool):
    """An energy at an anchor may be far below that at zero, where the difference is lost."""
    problems = batch(0, one_gram)
    anchor = random(0, M, N)
    gram, cross = problems[0].quadratic.gram.clone(), torch.zeros_like(anchor)
    near = Quadratic(gram, cross, cross[:, 0] + 1e-20, anchor)
    gram = near.gram if one_gram else problems[1].quadratic.gram
    single = Quadratic(gram.float(), problems[1].quadratic.cross.float(), problems[1].quadratic.energy.float()).double
    single = Quadratic(gram, single.cross, single.energy, cache=replace(single._cache, gram=gram), checked=False)
    whole = joined([Problem(near, L1(0.1)), Problem(single, L1(0.1))])
    assert whole is not None
    assert torch.equal(whole.quadratic.energy[:M], near.energy)
    assert bool((whole.quadratic.rounding[M:] >= single.rounding).all())


@pytest.mark.parametrize("one_gram", [True, False])
@pytest.mark.parametrize("name", ["fista", "admm"])
def test_an_iteration_of_a_batch_waits_for_nothing(one_gram: bool, name: str):
    problems = batch(0, one_gram)

    def work(count: int):
        return lambda: solve_all(problems, name, tolerance=0, max_iterations=count, check_every=1000)

    found = each(work(60), work(20), 40, size=COUNT * M * N, long=COUNT * M * N)
    assert (found["reads"], found["products"]) == (0, 1)


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from(("fista", "admm")), st.sampled_from(KINDS), st.sampled_from((0.5, 0.1, 0.01)))
def test_answers_with_and_without_screening_and_leaving_are_as_good(seed: int, name: str, kind: str, share: float):
    quadratic = make_layer(kind, 12, 24, seed).quadratic().at(None)
    scale = quadratic.scale()
    spread = torch.logspace(0, -2, 12, dtype=torch.float64)[:, None]  # some rows are done at once
    problem = Problem(quadratic, L1(share * float((quadratic.cross / scale).abs().max()) * scale * spread))
    solver, tolerance = make_solver(name, tolerance=1e-7, max_iterations=20_000, check_every=5), 1e-7
    with pytest.MonkeyPatch.context() as patched:
        quick = solver.solve(problem)
        patched.setattr(_iterative, "can_shrink", lambda _: False)
        slow = solver.solve(problem)
    assert quick.status is slow.status
    room = 2 * tolerance * slow.certificate.primal + 1e-13 * quadratic.target_energy
    assert abs(quick.certificate.primal - slow.certificate.primal) <= room
    assert quick.certificate.gap == pytest.approx(certify(problem, quick.weight).gap)


@pytest.mark.parametrize("name", ["fista", "admm"])
def test_rows_that_are_done_and_columns_that_are_zero_are_out_of_the_products(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    shapes, narrow = [], Shrink.narrow

    def seen(self: Shrink) -> bool:
        fewer = narrow(self)
        shapes.append(self.problem.shape)
        return fewer

    monkeypatch.setattr(Shrink, "narrow", seen)
    quadratic = make_layer("full rank", 20, 40, 3).quadratic().at(None)
    largest = float(quadratic.cross.abs().max())
    strengths = torch.full((20, 1), 1e-3 * largest, dtype=torch.float64)
    strengths[5:] = 2 * largest  # these rows are zero, and done at the first test
    penalty = L1(strengths.expand(20, 40).clone().index_fill_(1, torch.arange(30), 2 * largest))
    solution = make_solver(name, tolerance=1e-9, max_iterations=20_000, check_every=2).solve(
        Problem(quadratic, penalty)
    )
    assert solution.status is Status.SOLVED
    assert min(rows for rows, _ in shapes) <= 5 and min(columns for _, columns in shapes) < 20
    narrowed = len(shapes)
    FISTA(check_every=2).step(Problem(quadratic, penalty), torch.zeros_like(quadratic.cross), quadratic.cross)
    assert len(shapes) == narrowed  # what pruning calls is as before


def test_a_path_is_one_batch_and_begins_where_the_strength_before_ended(monkeypatch: pytest.MonkeyPatch):
    problem = batch(2, True)[0]
    strengths = np.geomspace(1.0, 1e-2, 12)
    for name in ("sklearn", "working-set", "admm"):
        solutions = path(
            problem, strengths, name, tolerance=1e-8, **({"max_iterations": 50_000} if name == "admm" else {})
        )
        for strength, solution in zip(strengths, solutions, strict=True):
            posed = Problem(problem.quadratic, problem.penalty.times(float(strength)))
            assert certify(posed, solution.weight).relative_gap <= 1e-8
            assert solution.certificate.primal == pytest.approx(posed.value(solution.weight))
    small = [s.certificate.primal for s in solutions]
    monkeypatch.setattr("convexprune.solvers.AT_ONCE", 1)  # one by one
    assert [s.certificate.primal for s in path(problem, strengths, tolerance=1e-8)] == pytest.approx(small, rel=3e-8)
