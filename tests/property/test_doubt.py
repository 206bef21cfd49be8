"""What rounding to float32 hides in a singular Gram matrix: certificates hold for every problem that was rounded so."""

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_layer, random, seeds
from torch import Tensor

from convexprune.core._certificate import certify
from convexprune.core._penalty import L1, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.solvers import Status, make_solver, solve_all

KINDS = ("low rank", "one token", "duplicates", "nearly duplicates", "dead columns")
few = settings(max_examples=30)


def data(kind: str, seed: int, n: int = 24, m: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs [tokens n] and a weight [m n] in float32, with a singular Gram matrix."""
    rank = {"one token": 1, "low rank": 5}.get(kind, n // 2)
    x = random(seed, max(rank, 8), rank) @ random(seed + 1, rank, n)
    if "duplicates" in kind:
        x[:, n // 2 :] = x[:, : n // 2] * (1 if kind == "duplicates" else 1 + 1e-7 * random(seed + 3, n // 2))
    if kind == "dead columns":
        x[:, ::5] = 0
    x = x[:1] if kind == "one token" else x
    return x.float(), random(seed + 2, m, n).float()


def twins(kind: str, seed: int, anchored: bool) -> tuple[Quadratic, Quadratic]:
    """The quadratic with tensors of float32, and that of the same data in float64."""
    x, w = data(kind, seed)
    y = x @ w.T
    stored = Quadratic.least_squares(x, y, w if anchored else None)
    return stored, Quadratic.least_squares(x.double(), y.double(), w.double() if anchored else None)


def excess(quadratic: Quadratic, mask: Tensor, weight: Tensor) -> float:
    """How much least squares on a support would still gain, with negative eigenvalues for zero."""
    residual, total = quadratic.residual(weight), 0.0
    for on, row in zip(mask, residual, strict=True):
        energies, directions = torch.linalg.eigh(quadratic.gram[on][:, on])
        alive = energies > 1e-14 * energies.max()
        total += float(((directions.T @ row[on])[alive].square() / energies[alive]).sum() / 2)
    return total


@few
@given(st.sampled_from(KINDS), seeds, st.booleans(), st.sampled_from((0.0, 1e-3, 0.3)))
def test_a_gap_on_a_support_covers_the_data_and_the_stored_tensors(kind, seed, anchored, far):
    stored, exact = twins(kind, seed, anchored)
    mask = random(seed + 4, *stored.shape) > -0.3
    problem = Problem(stored, Support(mask))
    weight = make_solver("cg").solve(problem).weight
    weight = weight * (1 + far * random(seed + 5, *stored.shape).float())
    gap, tiny = certify(problem, weight).gap, 1e-12 * exact.target_energy
    assert gap >= excess(exact, mask, weight.double()) - tiny
    # A sum of squares has no more to gain than its value: what the stored tensors promise beyond is rounding.
    assert gap >= min(excess(stored.double, mask, weight.double()), problem.value(weight)) - tiny


@pytest.mark.long
@few
@given(st.sampled_from(KINDS), seeds, st.booleans(), st.sampled_from((0.3, 1e-2, 1e-4)))
def test_a_gap_of_a_lasso_covers_the_data(kind, seed, anchored, radius):
    stored, exact = twins(kind, seed, anchored)
    strength = radius * float(exact.at(None).cross.abs().max())
    problem, twin = Problem(stored, L1(strength)), Problem(exact, L1(strength))
    solved = make_solver("fista").solve(problem)
    for weight in (solved.weight, 0.9 * solved.weight):
        best = certify(twin, make_solver("cvxpy").solve(twin, weight.double()).weight).primal
        assert certify(problem, weight).gap >= twin.value(weight.double()) - best - 1e-9 * exact.target_energy


def test_without_doubt_about_the_gram_matrix_a_gap_is_as_before():
    layer = make_layer("full rank", 3, 12, 0)
    stored = Quadratic.least_squares(layer.pruned.float(), layer.targets().float())
    assert stored.unit_free[0].doubt == 0


def test_the_doubt_is_what_makes_the_gram_matrix_definite():
    stored, exact = twins("low rank", 0, False)
    quadratic = stored.unit_free[0]
    least = -float(torch.linalg.eigvalsh(quadratic.gram)[0])
    assert least > 0
    assert least <= quadratic.doubt <= max(8 * least, torch.finfo(torch.float32).eps)
    assert exact.unit_free[0].doubt == 0


@pytest.mark.parametrize("anchored", [False, True])
def test_what_float32_does_not_resolve_is_not_called_solved(anchored):
    # Anchored, the energy is zero: it tells nothing of the rounding of H, which the displacement multiplies.
    stored, exact = twins("low rank", 1, anchored)
    mask = random(4, *stored.shape) > -0.3
    found, sure = (make_solver("cg").solve(Problem(q, Support(mask))) for q in (stored, exact))
    assert found.status is Status.UNCONFIRMED and sure.status in (Status.SOLVED, Status.UNCONFIRMED)


def inconsistent() -> Quadratic:
    """A quadratic with half of the energy that its cross term needs."""
    q = make_layer("full rank", 1, 6, 0).quadratic().at(None)
    least = (q.cross * torch.linalg.solve(q.gram, q.cross.T).T).sum(1)
    return Quadratic(q.gram, q.cross, torch.maximum(0.5 * least, (q.cross.square() / q.gram.diagonal()).amax(1)))


@pytest.mark.parametrize("made", ["itself", "scaled", "rows", "envelope", "sum", "double", "twice"])
def test_a_certificate_that_is_not_precise_is_of_a_sum_of_squares_too(made):
    q = inconsistent()
    ways = {
        "itself": lambda: q, "scaled": lambda: q.scaled(2 * q.scale()), "rows": lambda: q.rows(torch.tensor([0])),
        "envelope": lambda: q.envelope(1e9), "sum": lambda: q + 1e-9 * q, "double": lambda: q.double,
        "twice": lambda: 2 * q,
    }  # fmt: skip
    problem = Problem(ways[made](), L1(1e-3))
    for precise in (True, False):
        assert certify(problem, torch.zeros(1, 6), precise).gap == inf
    assert make_solver("fista", precise=False).solve(problem).status is Status.INCONSISTENT


def test_problems_side_by_side_are_of_sums_of_squares_too():
    several = [Problem(inconsistent(), L1(strength)) for strength in (1e-3, 2e-3)]
    for precise in (True, False):
        for each in solve_all(several, "fista", precise=precise):
            assert each.status is Status.INCONSISTENT


def test_what_was_computed_from_tokens_is_not_checked_again(monkeypatch):
    stored = Quadratic.least_squares(torch.randn(40, 8), torch.randn(40, 2))
    monkeypatch.setattr(Quadratic, "is_sum_of_squares", property(lambda _: pytest.fail("checked")))
    assert certify(Problem(stored, L1(0.1)), torch.zeros(2, 8), precise=False).gap < inf
