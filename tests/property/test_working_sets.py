"""Working sets, the choice of a solver, and paths: the answers are those of the slower solvers."""

import sys
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, make_layer, random, seeds

from convexprune import (
    L1,
    MCP,
    AbstractPenalty,
    ElasticNet,
    GroupLasso,
    Problem,
    Quadratic,
    Status,
    Support,
    make_solver,
    path,
    solve,
)
from convexprune.errors import ProblemError, UnsupportedError
from convexprune.problems import check_penalty

EXACT = make_solver("admm", tolerance=1e-10, max_iterations=50_000)


def drawn(kind: str, seed: int, m: int = 5, n: int = 8) -> tuple[Quadratic, float]:
    quadratic = make_layer(kind, m, n, seed).quadratic().at(None)
    return quadratic, float((quadratic.cross / quadratic.scale()).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, share=st.sampled_from((0.3, 0.03, 0.003)), form=st.sampled_from(("free", "box", "signs", "closed")))
def test_every_form_of_price_is_solved_to_ten_digits(kind, seed, share, form):
    quadratic, largest = drawn(kind, seed)
    scale = quadratic.scale()
    strength = share * largest * scale
    penalty = {
        "free": L1(strength * (random(seed, 8) > -1)) if kind == "full rank" else L1(strength),
        "box": ElasticNet(strength, 0.1 * scale**2, -0.3 * largest / scale, 0.1 * largest / scale),
        "signs": ElasticNet(strength, lower=0.0),
        "closed": L1(strength.where(random(seed, 8) > 0, inf)),
    }[form]
    problem = Problem(quadratic, penalty)
    ours = make_solver("working-set", tolerance=1e-10).solve(problem)
    slow = EXACT.solve(problem)
    assert ours.status is Status.SOLVED
    assert ours.certificate.primal <= slow.certificate.primal * (1 + 1e-9) + 1e-14 * float(quadratic.energy.sum())


@pytest.mark.parametrize("rest", [{"ridge": 0.1}, {"lower": -0.2, "upper": 0.2}, {"upper": 0.0, "lower": -9.0}])
def test_rows_with_a_ridge_or_on_their_bounds_are_done_when_they_are(rest: dict[str, float]):
    quadratic = drawn("full rank", 0)[0]
    solution = solve(Problem(quadratic, ElasticNet(0.1, **rest)), "working-set", tolerance=1e-8)
    assert solution.status is Status.SOLVED and solution.iterations < 10


def test_where_newton_steps_would_leave_a_bound_a_slower_step_goes_on():
    x = torch.tensor([[-0.57, 0.44, 0.72, -0.89, -0.57]], dtype=torch.float64)  # one token: H is singular
    lower = torch.tensor([-0.33, -0.37, -0.3, -0.05, -0.32], dtype=torch.float64)
    upper = torch.tensor([0.31, 0.2, 0.13, 0.08, 0.37], dtype=torch.float64)
    target = torch.tensor([[0.44]], dtype=torch.float64)
    problem = Problem(Quadratic.least_squares(x, target), ElasticNet(0.007, lower=lower, upper=upper))
    solution = solve(problem, "working-set", tolerance=1e-8)
    assert solution.status is Status.SOLVED and solution.iterations < 10


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), seeds, st.sampled_from((0.3, 0.03, 0.003)), st.booleans(), st.booleans())
def test_coordinate_descent_of_scikit_learn_is_of_the_same_problem(kind, seed, share, positive, ridge):
    quadratic, largest = drawn(kind, seed)
    strength = share * largest * quadratic.scale() * (1 + random(seed + 9, 5, 1).abs())
    penalty = ElasticNet(strength, 0.3 * strength**2 / largest**2 * ridge, 0.0 if positive else -inf)
    problem = Problem(quadratic, penalty)
    fine = make_solver("sklearn", tolerance=1e-9, max_iterations=100_000)
    solution, slow = fine.solve(problem), EXACT.solve(problem)
    assert solution.certificate.primal <= slow.certificate.primal * (1 + 1e-8) + 1e-13 * quadratic.target_energy
    again = make_solver("sklearn", tolerance=1e-6).solve(problem, solution.weight)
    assert again.iterations <= solution.iterations


def test_scikit_learn_says_what_it_does_not_take():
    quadratic, _ = drawn("full rank", 0)
    ridges = torch.tensor([1.0, 2.0] * 4, dtype=torch.float64)
    for penalty in (
        L1(0.0), L1(ridges.masked_fill(ridges > 1, inf)), ElasticNet(0.1, ridges), ElasticNet(0.1, upper=1),
        ElasticNet(0.1, lower=-ridges),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="`working-set` takes all"):
            solve(Problem(quadratic, penalty), "sklearn")
        assert solve(Problem(quadratic, penalty)).status is Status.SOLVED


def test_a_start_is_used_and_finished_rows_leave():
    quadratic, largest = drawn("full rank", 1, 20, 60)
    problem = Problem(quadratic, L1(0.05 * largest * quadratic.scale()))
    for name, least, share in (("fista", 20, 1.0), ("admm", 10, 0.8), ("working-set", 2, 0.5)):
        solver = make_solver(name, tolerance=1e-8, **({} if name == "working-set" else {"max_iterations": 10_000}))
        cold = solver.solve(problem)
        assert cold.iterations > least
        assert solver.solve(problem, cold.weight).iterations == 0
        nearby = Problem(quadratic, problem.penalty.times(0.9))
        assert solver.solve(nearby, cold.weight).iterations < share * solver.solve(nearby).iterations


@pytest.mark.parametrize("loaded", [False, True])
def test_the_choice_is_by_penalty_and_by_zeros_and_says_why(loaded: bool, monkeypatch: pytest.MonkeyPatch):
    make_solver("sklearn")  # loads it
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", sys.modules["sklearn.linear_model"])
    if not loaded:
        monkeypatch.delitem(sys.modules, "sklearn.linear_model")
    quadratic, largest = drawn("full rank", 2, 40, 60)
    scale = quadratic.scale()
    chosen = {
        "sklearn: few" if loaded else "working-set: few": L1(0.3 * largest * scale),
        "working-set: few weights": ElasticNet(0.3 * largest * scale, upper=10 / scale),
        "admm: many": L1(1e-4 * largest * scale),
        "admm: the penalty is GroupLasso": GroupLasso(0.3 * largest),
        "cg": Support(random(0, 40, 60) > 0),
        "fista": MCP(0.9 * largest * scale),
    }
    for reason, penalty in chosen.items():
        solution = solve(Problem(quadratic, penalty))
        assert solution.solver.startswith(reason)
        assert solution.status in (Status.SOLVED, Status.STATIONARY)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_a_path_is_the_solves_one_by_one(seed: int):
    quadratic, largest = drawn("full rank", seed)
    strengths = [0.1 * largest, largest, 0.01 * largest, 0.1 * largest]
    solutions = path(Problem(quadratic, L1(quadratic.scale())), strengths, tolerance=1e-8)
    for strength, solution in zip(strengths, solutions, strict=True):
        alone = solve(Problem(quadratic, L1(strength * quadratic.scale())), tolerance=1e-8)
        assert solution.certificate.relative_gap <= 1e-8
        assert solution.certificate.primal == pytest.approx(alone.certificate.primal, rel=3e-8)
    for wrong in (0.0, -1.0, inf, float("nan")):
        with pytest.raises(ProblemError, match=r"among them\. Accepted: positive, finite numbers"):
            path(Problem(quadratic, L1(1.0)), [1.0, wrong])


def test_a_multiple_of_a_penalty_is_a_penalty():
    class Lengths(AbstractPenalty):
        """Without fields that are prices."""

        def values(self, weight):
            return weight.norm(dim=1)

        def prox(self, weight, step):
            return weight * (1 - step / weight.norm(dim=1, keepdim=True)).clamp_min(0)

        def dual_scale(self, dual):
            return 1 / dual.norm(dim=1)

    weight = random(1, 3, 12)
    for penalty in (Lengths(), L1(0.3), ElasticNet(0.3, 0.2, lower=-1), GroupLasso(0.3)):
        multiple = penalty.times(2.5)
        torch.testing.assert_close(multiple.values(weight), 2.5 * penalty.values(weight))
        assert all(result.passed for result in check_penalty(multiple))
