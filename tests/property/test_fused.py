"""What is one kernel on a GPU gives on the CPU what it gives op by op; nothing in a loop makes a GPU wait."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

import pytest
import torch
from counting import counted
from pruning_cases import correlated, layer_problem

from convexprune._device import kernels as room
from convexprune._device.capabilities import has_kernels
from convexprune._device.kernels import number_like
from convexprune.constraints import Stacked, Unstructured
from convexprune.core._penalty import L1
from convexprune.core._problem import Problem
from convexprune.pruners import Convex
from convexprune.pruners import _convex as convex
from convexprune.solvers._cg import ConjugateGradient
from convexprune.solvers._fista import FISTA

ROUNDING = 1e-6  # float32, a few operations


def work(m: int, n: int, step: float) -> list[torch.Tensor]:
    """The elementwise work of a round of the path, for a weight [m n]."""
    random = torch.Generator().manual_seed(m)
    a, b, c, d = (torch.randn(m, n, generator=random) for _ in range(4))
    start, slope, scores = convex._ahead(a, b, c, d, number_like(step, a))
    strengths = convex._strengths(scores, scores.abs().mean(1, keepdim=True), number_like(step, a))
    shrunk = L1(strengths).prox(start, step)
    elsewhere = L1(0.5).prox(slope, step)
    in_place = slope.clone()
    L1(strengths).prox_(in_place, step)  # as FISTA does
    return [start, slope, scores, strengths, shrunk, elsewhere, in_place]


@contextmanager
def compiled(backend: str) -> Iterator[list[str]]:
    """Compile as on a GPU, by another backend; the names of the functions that were."""
    real, seen = torch.compile, list[str]()

    def compiling(function, **settings):
        seen.append(function.__name__)
        return real(function, backend=backend, fullgraph=True, **settings)  # no part of it is left to Python

    with ExitStack() as stack:
        stack.enter_context(patch.object(room, "has_kernels", lambda device: True))
        stack.enter_context(patch.object(torch, "compile", compiling))
        stack.enter_context(patch.object(room, "_compiled", cache(room._compiled.__wrapped__)))  # anew
        torch._dynamo.reset()
        yield seen


def check(backend: str) -> None:
    cases = [(6, 8, 0.3), (6, 8, 0.7), (12, 8, 0.2), (5, 16, 1.1), (7, 3, 0.9)]
    expected = [work(*case) for case in cases]
    with compiled(backend) as seen:
        work(*cases[0])
        work(*cases[2])  # another shape, another number: from here on both are variables
        with patch.object(torch._dynamo.config, "error_on_recompile", True):
            found = [work(*case) for case in cases]
    assert seen == ["_ahead", "_strengths", "_soft"]
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.long
def test_the_graph_of_a_round_is_whole_and_serves_every_shape_and_number():
    check("aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_a_compiled_round_is_the_round():
    check("inductor")


def test_kernels_are_for_gpus(monkeypatch: pytest.MonkeyPatch):
    assert not has_kernels(torch.device("cpu"))
    monkeypatch.setattr("convexprune._device.capabilities.find_spec", lambda name: object())
    assert has_kernels.__wrapped__(torch.device("cuda")) and not has_kernels.__wrapped__(torch.device("mps"))
    monkeypatch.setattr("convexprune._device.capabilities.find_spec", lambda name: None)
    assert not has_kernels.__wrapped__(torch.device("cuda"))


def waits(work: Callable[[], object]) -> int:
    return counted(work)["reads"]


def pruned(**settings) -> int:
    problem = layer_problem(correlated(0, 12, 16), Stacked.alike(Unstructured(0.5), (8, 4)))
    return waits(lambda: Convex(**settings).prune(problem))


def test_the_host_waits_only_at_check_points():
    # Rounds and iterations between two certificates or tests cost none: twice as many wait as often.
    assert pruned(rounds=10, refit=None) == pruned(rounds=40, refit=None)
    few, many = (ConjugateGradient(0, 10, check_every=every) for every in (5, 1))
    assert pruned(refit=many) > pruned(refit=few)
    assert pruned(refit=few) == pruned(refit=ConjugateGradient(0, 20, check_every=10))


def test_fista_waits_only_where_it_tests_the_gap():
    problem = Problem(layer_problem(correlated(0, 12, 16), Unstructured(0.5)).quadratic, L1(0.1))
    FISTA(0, 1, scale=False).solve(problem)  # what is computed once is known from here on

    def solved(iterations: int, check_every: int) -> int:
        return waits(lambda: FISTA(0, iterations, check_every, scale=False).solve(problem))

    assert solved(10, 1000) == solved(40, 1000)
    assert solved(40, 10) > solved(40, 1000)
