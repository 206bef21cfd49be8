"""What an iteration costs on a GPU, counted on the CPU; and that what is selected there is what is selected here."""

from collections.abc import Callable, Iterator

import pytest
import torch
from counting import counted, each
from hypothesis import given
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from strategies import random, seeds

from convexprune._device import select
from convexprune._device.select import kth_by_counts, largest_of_groups, middle_of_groups
from convexprune.constraints import Columns, Constraint, SemiStructured, Stacked, Unstructured, _budget
from convexprune.core._moments import Moments
from convexprune.core._penalty import L1
from convexprune.core._problem import Problem
from convexprune.pruners import ADMM, ALPS, AbstractPruner, Convex, FISTAPruner
from convexprune.solvers._admm import ADMM as ADMM_SOLVER
from convexprune.solvers._base import AbstractSolver
from convexprune.solvers._cg import ConjugateGradient
from convexprune.solvers._fista import FISTA

M, N = 12, 16


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Select as on a GPU, where all lines are long."""
    for room in (select, _budget):
        monkeypatch.setattr(room, "is_host", lambda device: False)
    monkeypatch.setattr(select, "SHORT", 0)
    yield


PATTERNS: dict[str, Constraint] = {
    "matrix": Unstructured(0.5), "row": Unstructured(0.5, "row"), "2:4": SemiStructured(2, 4), "columns": Columns(0.5),
    "stack": Stacked.alike(Unstructured(0.5), (8, 4)),
}  # fmt: skip


def path(rounds: int) -> AbstractPruner:
    return Convex(rounds=rounds, refit=None)


def admm(iterations: int) -> AbstractPruner:
    return ADMM(iterations=iterations, every=100, refit=None)


def with_refit(iterations: int) -> AbstractPruner:
    return Convex(rounds=4, refit=ConjugateGradient(0, iterations, check_every=50))


MAKES = {"convex": path, "admm": admm, "refit": with_refit}


def iteration(
    make: Callable[[int], AbstractPruner], pattern: str, compiled: bool = False, many: int = 20
) -> dict[str, float]:
    """What one costs, of `many` more than as many."""
    problem = layer_problem(correlated(0, M, N), PATTERNS[pattern])
    assert problem.typical_energy > 0  # what is read once is known from here on
    how = {"size": M * N, "long": N, "compiled": compiled}
    return each(lambda: make(2 * many).prune(problem), lambda: make(many).prune(problem), many, **how)


@pytest.mark.long
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.usefixtures("elsewhere")
def test_an_iteration_waits_for_nothing_and_sorts_nothing(name: str, pattern: str):
    found = iteration(MAKES[name], pattern, many=8)
    assert (found["reads"], found["sorts"], found["products"]) == (0, 0, 1)


MOST = {"convex": (51, 31), "admm": (29, 25), "refit": (23, 9)}
"""Reads and writes of a weight [m n] in an iteration, op by op and with kernels; lab/benchmarks.md has them all."""


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_iteration_passes_over_memory_no_more_often_than_it_did(name: str, pattern: str):
    for compiled, most in zip((False, True), MOST[name], strict=True):
        assert iteration(MAKES[name], pattern, compiled)["passes"] <= most


@pytest.mark.parametrize("make", [FISTA, ADMM_SOLVER])
def test_a_solver_waits_only_where_it_tests_the_gap(make: Callable[..., AbstractSolver]):
    problem = Problem(layer_problem(correlated(0, M, N), Unstructured(0.5)).quadratic, L1(0.1))

    def solved(iterations: int, every: int) -> Callable[[], object]:
        return lambda: make(tolerance=0, max_iterations=iterations, check_every=every, scale=False).solve(problem)

    solved(1, 1)()  # what is computed once is known from here on
    assert each(solved(40, 1000), solved(20, 1000), 20)["reads"] == 0
    assert each(solved(40, 4), solved(40, 8), 5)["reads"] <= 4  # finite, solved, and whether a part is left


@pytest.mark.parametrize("pruner", [Convex(), ALPS(), FISTAPruner()], ids=lambda pruner: type(pruner).__name__)
def test_the_gram_matrix_of_a_group_is_built_once(pruner: AbstractPruner, monkeypatch: pytest.MonkeyPatch):
    built = list[int]()
    real = Moments.gram.fget
    assert real is not None
    counting = property(lambda moments: built.append(id(moments)) or real(moments))
    monkeypatch.setattr(Moments, "gram", counting)
    problem = layer_problem(correlated(0, M, N, change=0.3), PATTERNS["stack"])
    edit = pruner.prune(problem.scaled(torch.linspace(0.5, 2, M, dtype=torch.float64)))
    assert problem.squared_error(edit.weight).sum() < problem.energy.sum()
    assert len(built) == 1  # before: 3, and 4 of FISTAPruner


def lines(seed: int, m: int, n: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    values = random(seed, m, n).abs().to(dtype)
    if kind == "ties":
        values = values.round()
    if kind == "extremes":
        values[:, ::2] = torch.tensor([0.0, torch.inf, torch.finfo(dtype).tiny, torch.nan], dtype=dtype)[
            torch.arange(values[:, ::2].shape[1]) % 4
        ]
    return values


KINDS = ("plain", "ties", "extremes")
DTYPES = (torch.float32, torch.float64)


@given(seeds, st.integers(1, 3), st.integers(1, 40), st.sampled_from(DTYPES), st.sampled_from(KINDS), st.data())
def test_counting_finds_what_kthvalue_finds(seed: int, m: int, n: int, dtype: torch.dtype, kind: str, data):
    values, k = lines(seed, m, n, dtype, kind), data.draw(st.integers(1, n))
    expected = values.kthvalue(k, dim=1, keepdim=True).values
    for digit in (1, 3, 4):
        torch.testing.assert_close(kth_by_counts(values, k, digit), expected, rtol=0, atol=0, equal_nan=True)


def test_a_digit_of_the_numbers_is_one_pass_over_them():
    values = lines(0, 1, 512, torch.float32, "plain")
    found = counted(lambda: kth_by_counts(values, 99), size=512, long=0)
    assert found["reads"] == found["sorts"] == 0 and found["passes"] <= 3 * 31 + 1
    fused = counted(lambda: kth_by_counts(values, 99), size=512, long=0, compiled=True)
    assert fused["reads"] == fused["sorts"] == 0 and fused["passes"] <= 8  # a read for each digit


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_is_selected_on_every_device(pattern: str, ties: bool, request: pytest.FixtureRequest):
    scores = lines(1, M, N, torch.float32, "ties" if ties else "plain")
    constraint = PATTERNS[pattern]
    here = constraint.mask(scores), constraint.threshold(scores)
    request.getfixturevalue("elsewhere")
    there = constraint.mask(scores), constraint.threshold(scores)
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


@pytest.mark.parametrize("width", [4, 8, 16, 32])  # the last one is sorted
@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_ranked_as_by_a_stable_sort(width: int, kind: str):
    groups = lines(width, 6, 4 * width, torch.float32, kind).view(6, 4, width)
    for kept in (1, width // 2, width - 1):
        order = groups.sort(dim=-1, descending=True, stable=True)
        expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order.indices[..., :kept], True)
        assert torch.equal(largest_of_groups(groups, kept), expected)
        if kind != "extremes":
            middle = (order.values[..., kept - 1, None] + order.values[..., kept, None]) / 2
            assert torch.equal(middle_of_groups(groups, kept), middle)
