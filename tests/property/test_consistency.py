from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, make_layer, random, seeds, sizes

from convexprune.core._certificate import certify
from convexprune.core._penalty import L1, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.errors import ProblemError
from convexprune.solvers import Status, make_solver

TRIANGLE = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]], dtype=torch.float64)
"""Every pair of these three inputs could correlate so, but not all three: the least eigenvalue is -0.8."""


def tensors(seed=0, m=2, n=4) -> dict[str, Any]:
    q = make_layer("full rank", m, n, seed).quadratic().at(None)
    return {"gram": q.gram.clone(), "cross": q.cross.clone(), "energy": q.energy.clone()}


def doubled(of):
    of["gram"][0, 1] += 0.5 * of["gram"].diagonal().min()


def dead_with_a_target(of):
    of["gram"][0], of["gram"][:, 0] = 0, 0


FAULTS = {
    "not symmetric": doubled,
    "on its diagonal": lambda of: of["gram"][0, 0].mul_(-1),
    "not positive semidefinite": lambda of: of["gram"][0, 0].mul_(1e-3),
    "the constant": lambda of: of["energy"].zero_(),
    "cannot be left out": lambda of: of["gram"].zero_(),
    "is always zero": dead_with_a_target,
    "`energy` of output 1": lambda of: of["energy"][1].mul_(-1),
    "`gram` holds": lambda of: of["gram"][1, 1].fill_(float("nan")),
    "`cross` holds": lambda of: of["cross"][1, 1].fill_(inf),
    "one dtype": lambda of: of.update(cross=of["cross"].float()),
    "32 or 64 bits": lambda of: of.update({name: t.half() for name, t in of.items()}),
    "one of each at least": lambda of: of.update(gram=torch.zeros(0, 0), cross=torch.zeros(2, 0)),
    "of type str": lambda of: of.update(energy="none"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_cannot_be_a_sum_of_squares_is_refused_by_name(message):
    of = tensors()
    FAULTS[message](of)
    with pytest.raises(ProblemError, match=message):
        Quadratic(**of)


def test_a_gram_matrix_that_is_symmetric_but_for_rounding_is_made_so():
    of = tensors()
    of["gram"][0, 1] *= 1 + 1e-12
    gram = Quadratic(**of).gram
    assert torch.equal(gram, gram.T)


def test_arrays_are_tensors():
    of = tensors()
    first, second = Quadratic(**of), Quadratic(**{name: t.numpy() for name, t in of.items()})
    weight, mask = random(1, 2, 4), random(2, 2, 4) > 0
    for make in (lambda wrap: L1(wrap(mask.double())), lambda wrap: Support(wrap(mask))):
        tensor = certify(Problem(first, make(lambda t: t)), weight * mask)
        array = certify(Problem(second, make(lambda t: t.numpy())), (weight * mask).numpy())
        assert array == tensor
    x, y = random(3, 9, 4), random(4, 9, 2)
    assert torch.equal(Quadratic.least_squares(x.numpy(), y.numpy()).gram, Quadratic.least_squares(x, y).gram)


@pytest.mark.parametrize("name", ["fista", "admm"])
def test_an_indefinite_gram_matrix_has_no_certificate(name):
    quadratic = Quadratic(TRIANGLE, torch.ones(1, 3, dtype=torch.float64), 100 * torch.ones(1, dtype=torch.float64))
    problem = Problem(quadratic, L1(0.1))
    assert certify(problem, torch.zeros(1, 3)).gap == inf
    solution = make_solver(name, max_iterations=50).solve(problem)
    assert solution.status in (Status.INCONSISTENT, Status.NON_FINITE)
    assert solution.certificate.relative_gap == inf


@given(st.integers(2, 8), seeds)
def test_an_energy_below_what_the_cross_term_needs_has_no_certificate(n, seed):
    # Every entry is possible, G_ij^2 <= e_i H_jj, but e_i is half of G_i H^-1 G_i'.
    q = make_layer("full rank", 1, n, seed).quadratic().at(None)
    least = (q.cross * torch.linalg.solve(q.gram, q.cross.T).T).sum(1)
    low = torch.maximum(0.5 * least, (q.cross.square() / q.gram.diagonal()).amax(1))
    if bool(low > 0.9 * least):
        return
    problem = Problem(Quadratic(q.gram, q.cross, low), L1(1e-3))
    assert certify(problem, torch.zeros(1, n)).gap == inf
    assert make_solver("fista").solve(problem).status is Status.INCONSISTENT


@given(
    st.sampled_from(KINDS), sizes, sizes, seeds, st.sampled_from((torch.float32, torch.float64)),
    st.integers(-12, 12), st.integers(-6, 6), st.booleans(),
)  # fmt: skip
def test_what_was_made_of_tokens_is_never_refused(kind, m, n, seed, dtype, size, weights, anchored):
    layer = make_layer(kind, m, n, seed)
    x, w = (10.0**size * layer.pruned).to(dtype), (10.0**weights * layer.weight).to(dtype)
    y = x @ w.T + (10.0**size * (layer.dense - layer.pruned)).to(dtype) @ w.T
    quadratic = Quadratic.least_squares(x, y, w if anchored else None)
    again = Quadratic(quadratic.gram, quadratic.cross, quadratic.energy, quadratic.anchor)
    certificate = certify(Problem(again, L1(0.1 * float(again.at(None).cross.abs().max()))), w)
    assert certificate.gap <= certificate.primal * (1 + 1e-5)


def test_least_squares_needs_tokens_that_fit():
    x = torch.zeros(3, 2)
    cases = ((x[:0], x[:0]), (x, torch.zeros(4, 1)), (x, torch.zeros(3)), (x, x.double()), (x, x.fill_(float("nan"))))
    for inputs, targets in cases:
        with pytest.raises(ProblemError):
            Quadratic.least_squares(inputs, targets)


def test_a_problem_is_a_quadratic_and_a_penalty_of_one_shape():
    quadratic = Quadratic(**tensors())
    for first, second in ((L1(0.1), quadratic), (quadratic, None)):
        with pytest.raises(ProblemError, match="in this order"):
            Problem(first, second)  # pyright: ignore[reportArgumentType]
    for penalty in (L1(torch.ones(3)), L1(torch.ones(2, 5)), Support(torch.ones(4, 2) > 0)):
        with pytest.raises(ProblemError, match="broadcast"):
            Problem(quadratic, penalty)


def test_numbers_of_other_types_are_refused():
    for strength in ("0.1", None, object()):
        with pytest.raises(ProblemError):
            L1(strength)  # pyright: ignore[reportArgumentType]
    assert L1(1e100).strength == 1e100
    with pytest.raises(ProblemError, match="step"):
        L1(0.1).prox(torch.ones(1, 1), -1.0)
    with pytest.raises(ProblemError, match="floating point"):
        certify(Problem(Quadratic(**tensors()), L1(0.1)), torch.zeros(2, 4, dtype=torch.int64))


def test_arrays_of_numpy_scalars_are_strengths():
    given: Any = np.array([0.1, 0.2])
    assert torch.equal(torch.as_tensor(L1(given).strength), torch.as_tensor(given))


def test_moments_that_were_counted_in_float32_are_taken_in_float64():
    # Inputs that are all but multiples of each other: |H_jk| is above sqrt(H_jj H_kk) by a rounding error of float32.
    x = (random(0, 40, 1) @ random(1, 1, 30)).float()
    gram = x.T @ x
    assert bool((gram.double().abs() > torch.outer(*[gram.double().diagonal().sqrt()] * 2) * (1 + 1e-8)).any())
    Quadratic(gram.double(), torch.zeros(1, 30, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


@given(seeds)
def test_what_is_made_of_a_quadratic_knows_in_which_dtype_it_was_given(seed):
    layer = make_layer("full rank", 3, 6, seed)
    q = Quadratic.least_squares(layer.pruned.float(), layer.targets().float())
    chosen = torch.tensor([0, 2])
    for made in (q.double, q.double.rows(chosen), q.double.scaled(q.double.scale()), q.double.columns(chosen)):
        expected = q.rounding[chosen] if len(made.rounding) == 2 else q.rounding
        torch.testing.assert_close(made.rounding.float(), expected)


@given(seeds)
def test_the_quadratic_of_some_columns_is_that_of_all_with_the_others_at_the_anchor(seed):
    layer, chosen = make_layer("full rank", 3, 6, seed), torch.tensor([1, 2, 5])
    q = layer.quadratic()
    assert q.anchor is not None
    moved = random(seed + 1, 3, 3)
    weight = q.anchor.clone()
    weight[:, chosen] = moved
    torch.testing.assert_close(q.columns(chosen).values(moved), q.values(weight))
