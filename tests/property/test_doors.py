"""Any kind of arrays goes in, and the same kind comes out."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from math import inf

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random, seeds

from convexprune import (
    L1,
    ElasticNet,
    GroupLasso,
    NuclearNorm,
    Problem,
    Quadratic,
    Status,
    Support,
    certify,
    make_solver,
    path,
    solve,
    solve_all,
    solvers,
)
from convexprune.core._certificate import Certificate
from convexprune.core._moments import Moments
from convexprune.errors import DependencyError, ProblemError

TIGHT = {"tolerance": 1e-9, "max_iterations": 20_000}


def regression(seed: int, tokens: int = 30, inputs: int = 6, outputs: int = 2):
    x = random(seed, tokens, inputs) * (random(seed + 1, tokens, inputs) > 0)
    return x, 1.5 + x @ random(seed + 2, inputs, outputs) + 0.3 * random(seed + 3, tokens, outputs)


X, Y = (tensor.numpy() for tensor in regression(4, outputs=1))
POSED = Problem(Quadratic.least_squares(X, Y[:, 0]), L1(0.1))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_numpy_sparse_and_torch_are_one_problem_and_each_gets_its_own_kind(flat: bool, intercept: bool):
    x, y = regression(0)
    y = y[:, 0] if flat else y
    answers = []
    for inputs in (x, x.numpy(), scipy.sparse.csr_matrix(x.numpy()), scipy.sparse.coo_array(x.numpy())):
        targets = y if inputs is x else y.numpy()
        solution = solve(Problem(Quadratic.least_squares(inputs, targets, intercept=intercept), L1(0.1)), **TIGHT)
        assert type(solution.weight) is type(targets)
        assert tuple(solution.weight.shape) == ((6,) if flat else (2, 6))
        assert (solution.intercept is None) == (not intercept)
        assert isinstance(solution.intercept, float if flat else type(targets)) or not intercept
        answers.append((torch.as_tensor(solution.weight), torch.as_tensor(solution.intercept or 0.0 if flat else 0.0)))
    for weight, offset in answers[1:]:
        torch.testing.assert_close(weight, answers[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(offset, answers[0][1], rtol=0, atol=1e-6)


@settings(max_examples=10)
@given(seeds)
def test_an_intercept_is_a_column_of_ones_without_a_penalty(seed: int):
    x, y = regression(seed)
    centred = solve(Problem(Quadratic.least_squares(x, y, intercept=True), L1(0.05)), **TIGHT)
    ones = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    strengths = torch.tensor([0.05] * 6 + [0.0])
    other = solve(Problem(Quadratic.least_squares(ones, y), L1(strengths)), "admm", **TIGHT)
    assert centred.certificate.primal == pytest.approx(other.certificate.primal, rel=1e-7)
    torch.testing.assert_close(centred.intercept, other.weight[:, -1], rtol=0, atol=1e-3)
    about = Quadratic.least_squares(x, y, random(seed + 9, 2, 6), intercept=True)
    assert about.data is not None
    torch.testing.assert_close(about.data.intercept(centred.weight), centred.intercept)


@settings(max_examples=10)
@given(seeds, st.sampled_from((torch.float32, torch.float64)), st.floats(0, 1))
def test_sparse_inputs_far_from_zero_have_the_moments_of_dense_ones(seed: int, dtype: torch.dtype, full: float):
    x, y = regression(seed, tokens=200)
    far = {torch.float32: 1e3, torch.float64: 1e6}[dtype] * random(seed + 4, 6)
    x = ((x + far) * (random(seed + 5, 200, 6).argsort(0) < full * torch.arange(60, 420, 60))).to(dtype)
    exact, y = x.double() - x.double().mean(0), y.to(dtype)
    found = Quadratic.least_squares(scipy.sparse.csr_array(x.numpy()), y, intercept=True)
    scale = exact.square().mean(0).sqrt()
    wrong = (found.gram - exact.T @ exact / 200).abs() / torch.outer(scale, scale).clamp_min(1e-300)
    assert float(wrong.max()) < 100 * torch.finfo(dtype).eps
    cross = (y.double() - y.double().mean(0)).T @ exact / 200
    assert float(((found.cross - cross).abs() / scale.clamp_min(1e-300)).max()) < 1000 * torch.finfo(dtype).eps


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_what_is_made_of_a_quadratic_keeps_its_intercept_and_its_kind(flat: bool, kind):
    x, y = (kind(tensor.numpy()) for tensor in regression(5))
    y = y[:, 0] if flat else y
    q, m = Quadratic.least_squares(x, y, random(6, 1 if flat else 2, 6), intercept=True), 1 if flat else 2
    pull = Quadratic.damping(kind(np.zeros((m, 6))), kind(np.full(6, 0.1)))
    for made in (q + pull, pull + q, 2.0 * q, 0.5 * q + q, q.at(None), q.rows(slice(m)), q.repeated(2)):
        solution = solve(Problem(made, L1(0.1)), **TIGHT)
        assert type(solution.weight) is type(y) and solution.weight.ndim == y.ndim
        whole = solution.weight.reshape(m, -1, 6).sum(1)
        expected = torch.as_tensor(y).reshape(30, m).mean(0) - torch.as_tensor(whole) @ torch.as_tensor(x).mean(0)
        torch.testing.assert_close(torch.as_tensor(solution.intercept, dtype=torch.float64).reshape(m), expected)
    if m == 2:
        assert solve(Problem(q.rows(torch.tensor([1])), L1(0.1))).intercept.shape == (1,)
    assert solve(Problem(q + Quadratic.least_squares(x[:9], y[:9], intercept=True), L1(0.1))).intercept is None
    flatly = Quadratic.damping(kind(np.zeros(6)), kind(np.full(6, 0.1)))
    assert solve(Problem(flatly, L1(0.1))).weight.shape == (6,)


@pytest.mark.parametrize("laid_out", {
    "backwards": lambda array: array[..., ::-1].copy()[..., ::-1],
    "of the other byte order": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "read alone": lambda array: np.broadcast_to(array, array.shape),
}.values())  # fmt: skip
def test_arrays_may_lie_in_memory_as_numpy_allows(laid_out):
    x, y = (tensor.numpy() for tensor in regression(7, outputs=1))
    strength = np.arange(1.0, 7.0) / 20
    expected = solve(Problem(Quadratic.least_squares(x, y), L1(strength)), **TIGHT).weight  # pyright: ignore[reportArgumentType]
    found = solve(Problem(Quadratic.least_squares(laid_out(x), laid_out(y)), L1(laid_out(strength))), **TIGHT).weight
    np.testing.assert_array_equal(found, expected)
    mask = expected != 0
    np.testing.assert_array_equal(Support(laid_out(mask)).mask, mask)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("made", [
    lambda kind: L1(kind([1, 2, 3, 4, 5, 6])), lambda kind: ElasticNet(kind([1] * 6), kind([2]), lower=-kind([9])),
    lambda kind: GroupLasso(kind([1, 2, 3, 4, 5, 6])), lambda kind: NuclearNorm(kind([3])[0]),
    lambda kind: L1(kind([2])[0]),
])  # fmt: skip
def test_strengths_that_are_whole_numbers_are_as_fine_as_others(made):
    whole, exact = made(np.array), made(lambda numbers: np.array(numbers, dtype=float))
    problem = Problem(Quadratic.least_squares(*regression(8)), whole)
    (found,) = path(problem, [0.1], tolerance=1e-12)
    (expected,) = path(Problem(problem.quadratic, exact), [0.1], tolerance=1e-12)
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("name", ["admm", "fista", "working-set"])
@pytest.mark.parametrize("scale", [True, False])
def test_an_answer_shares_no_memory_with_its_start(name: str, scale: bool):
    settings = {} if name == "working-set" else {"scale": scale}
    start = solve(POSED, tolerance=1e-10).weight
    before = np.array(start)
    solve(POSED, name, start=start, **settings).weight[:] = 7
    np.testing.assert_array_equal(start, before)


def test_parameters_of_a_module_are_numbers_like_others():
    x, y = regression(9)
    layer = torch.nn.Linear(6, 2, bias=False, dtype=torch.float64)
    q = Quadratic.least_squares(x, y, anchor=layer.weight)
    assert solve(Problem(q, L1(0.1)), "cvxpy").status is Status.SOLVED
    assert solve(Problem(q, L1(0.1)), start=layer.weight).status is Status.SOLVED
    square = Quadratic(torch.nn.Parameter(q.gram), torch.nn.Parameter(q.cross), q.energy, layer.weight)
    moments = Moments(6, torch.float64)
    moments.add(x, x + 1)
    for made in (q, square, moments.reconstruction(layer.weight), Quadratic.damping(layer.weight, x[0].abs())):
        tensors = made.gram, made.cross, made.energy, made.anchor
        assert not any(tensor is None or tensor.requires_grad for tensor in tensors)


def test_starts_may_be_an_array_and_settings_numbers_of_numpy():
    starts = np.zeros((2, 6))
    for each in (starts, torch.as_tensor(starts), list(starts)):
        assert all(found.status is Status.SOLVED for found in solve_all([POSED, POSED], starts=each))
    assert solve(POSED, tolerance=np.float32(1e-3), max_iterations=np.int64(1000)).status is Status.SOLVED
    made = make_solver("fista", max_iterations=np.int64(1000), scale=np.True_)
    assert made == make_solver("fista", max_iterations=1000) and type(vars(made)["max_iterations"]) is int
    assert POSED.quadratic.repeated(np.int64(2)).shape == (1, 12)  # pyright: ignore[reportArgumentType]


def test_lists_integers_and_one_row_of_moments_are_taken():
    x, y = [[1, 0], [0, 1], [1, 1]], [1.0, 2.0, 3.5]
    flat = solve(Problem(Quadratic.least_squares(x, y), L1(0.0)), **TIGHT)
    assert isinstance(flat.weight, np.ndarray) and np.allclose(
        flat.weight, np.linalg.lstsq(np.array(x), y)[0], atol=1e-4
    )
    gram, cross = np.eye(2), np.array([1.0, 0.2])
    solution = solve(Problem(Quadratic(gram, cross, 2.0), L1(0.5)))  # pyright: ignore[reportArgumentType]
    assert np.allclose(solution.weight, [0.5, 0.0])
    assert certify(Problem(Quadratic(gram, cross, 2.0), L1(0.5)), solution.weight).relative_gap < 1e-4  # pyright: ignore[reportArgumentType]


def test_sparse_inputs_of_another_length_are_refused():
    with pytest.raises(ProblemError, match=r"\[3, 2\] and targets \[4, 1\]"):
        Quadratic.least_squares(scipy.sparse.eye_array(3, 2).tocsc(), np.zeros(4))


@pytest.mark.parametrize("name", ["fista", "admm", "cvxpy", "scipy"])
def test_an_entry_of_infinite_strength_is_zero_and_the_rest_is_as_without_it(name: str):
    x, y = regression(1)
    strengths = torch.tensor([[0.05, inf, 0.0, 0.05, inf, 0.05], [0.05] * 6], dtype=torch.float64)
    whole = Problem(Quadratic.least_squares(x, y), L1(strengths))
    solution = make_solver(name).solve(whole, torch.ones(2, 6))
    assert solution.status is Status.SOLVED
    assert not solution.weight[0, [1, 4]].any() and bool((solution.weight[1] != 0).sum() > 3)
    assert certify(whole, torch.ones(2, 6)).primal == inf
    kept = [0, 2, 3, 5]
    alone = Problem(Quadratic.least_squares(x[:, kept], y[:, :1]), L1(strengths[:1, kept]))
    best = solve(alone, "admm", **TIGHT).certificate.primal
    assert best * (1 - 1e-9) <= certify(alone, solution.weight[:1, kept]).primal <= best * (1 + 1e-4)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
@pytest.mark.parametrize("tokens", [3, 30])
def test_a_copy_of_a_problem_is_solved_as_the_problem(copied: Callable[[Problem], Problem], tokens: int):
    problem = Problem(Quadratic.least_squares(*regression(0, tokens)), GroupLasso(0.3))
    untried = copied(problem)
    solution = solve(problem)
    for other in (untried, copied(problem)):
        assert torch.equal(solve(other).weight, solution.weight)
        assert certify(other, solution.weight, precise=False) == certify(problem, solution.weight, precise=False)


def test_a_solution_and_a_certificate_print_what_a_person_asks_first():
    solution = solve(Problem(Quadratic.least_squares(*regression(2)), L1(0.3)))
    text = str(solution)
    for name in ("status", "objective", "gap", "iterations", "seconds", "zeros", "solver"):
        assert f"\n{name}" in f"\n{text}"
    assert "solved." in text and " of [2, 6]" in text
    assert len(repr(solution)) < 120 and "SOLVED" in repr(solution)
    assert "<th>KKT residual</th>" in solution._repr_html_()
    assert (
        str(Certificate(1.0, 0.5, inf)).splitlines()[1]
        == "gap           0.5, 0.5 of the objective; no weight is below 0.5"
    )
    own = solve(Problem(Quadratic.least_squares(*regression(2)), L1(0.3)), make_solver("fista"))
    assert own.facts()["solver"] == "FISTA"


def test_the_mathematics_needs_neither_transformers_nor_cvxpy():
    code = """
import sys
sys.modules.update(dict.fromkeys(("transformers", "cvxpy", "sklearn", "huggingface_hub", "safetensors")))
import numpy, convexprune as c
x = numpy.random.default_rng(0).normal(size=(40, 5))
print(c.solve(c.Problem(c.Quadratic.least_squares(x, x[:, 0]), c.L1(0.1))))
sys.modules.pop("transformers"), sys.modules.pop("huggingface_hub"), sys.modules.pop("safetensors")
print(c.Report, c.prune)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "solved." in done.stdout and "80.0% of [5]" in done.stdout


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ModuleNotFoundError("No module named 'cvxpy'", name="cvxpy")

    monkeypatch.setattr(solvers, "import_module", missing)
    with pytest.raises(DependencyError, match=r"needs cvxpy, an extra: pip install"):
        make_solver("cvxpy")
