"""Certificates without products in float64 are bounds, nearly as tight; products of parts are as exact as they say."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random, seeds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convexprune._device import capabilities, precision
from convexprune._device.precision import Parts, certifies_in_parts, certifying_in, error_of_parts, product_of_parts
from convexprune.core import _in_parts as in_parts
from convexprune.core._certificate import Certificate, certify
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.solvers._fista import FISTA

TIGHT = 1.02  # times as large as a gap in float64 at most, where damping is .05 or more
UNSEEN = 1e-9  # of the objective: what float64 itself rounds

counts = st.integers(1, 7)


def exact(a: Tensor, b: Tensor) -> list[list[Fraction]]:
    rows, columns = a.tolist(), b.T.tolist()
    return [
        [sum((Fraction(x) * Fraction(y) for x, y in zip(r, c, strict=True)), Fraction(0)) for c in columns]
        for r in rows
    ]


@settings(max_examples=30)
@given(seeds, st.integers(1, 2), st.integers(1, 6), counts, st.sampled_from([1.0, 1e-30, 1e20]))
def test_a_product_of_parts_is_as_near_as_its_bound(seed: int, m: int, n: int, count: int, unit: float):
    a, b = unit * random(seed, m, n), random(seed + 1, n, 2) * torch.tensor([1.0, 1e-6], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "LINES", 4)
        left, right = Parts.of(a, count, 1), Parts.of(b, count, 0)
        found, bound = product_of_parts(left, right, count), error_of_parts(left, right, count)
    for i, row in enumerate(exact(a, b)):
        assert all(abs(Fraction(float(found[i, j])) - x) <= Fraction(float(bound[i, 0])) for j, x in enumerate(row))


def test_the_bound_of_a_product_is_no_larger_than_it_need_be():
    a, b = random(0, 40, 200), random(1, 200, 40)
    for count in (2, 4, 6):
        left, right = Parts.of(a, count, 1), Parts.of(b, count, 0)
        wrong = (product_of_parts(left, right, count) - a @ b).abs().max()
        assert wrong <= error_of_parts(left, right, count).max() <= 200 * wrong  # errors of either sign cancel


def test_what_is_whole_in_its_parts_is_multiplied_exactly():
    a = torch.randint(-(2**11), 2**11, (5, 8192)).double()
    b = torch.randint(-(2**11), 2**11, (8192, 3)).double()
    assert torch.equal(product_of_parts(Parts.of(a, 4, 1), Parts.of(b, 4, 0), 4), (a.long() @ b.long()).double())
    assert max(int(part.abs().max()) for part in Parts.of(a, 4, 1).parts) <= 64


def problem(seed: int, m: int, n: int, damping: float, penalty: str) -> Problem:
    x = random(seed, n, n + 3) * torch.logspace(0, 1, n, dtype=torch.float64)[:, None]
    gram = x @ x.T / (n + 3)
    gram.diagonal().mul_(1 + damping)
    weight = random(seed + 1, m, n)
    cross, energy = weight @ gram, torch.linalg.vecdot(weight @ gram, weight)
    quadratic = Quadratic(gram.float(), cross.float(), energy.float() * 1.001)
    mask = random(seed + 2, m, n) > 0
    posed: AbstractPenalty = Support(mask) if penalty == "support" else L1(0.3 * gram.diagonal().sqrt().float())
    return Problem(quadratic, posed)


def near(posed: Problem, seed: int, distance: float) -> tuple[Tensor, float]:
    """A weight of float32 near the solution, and how far its objective is from the least, or more, in float64."""
    exactly = Problem(posed.quadratic.double, posed.penalty.to(torch.float64))
    if isinstance(posed.penalty, Support):
        best = torch.zeros(posed.shape, dtype=torch.float64)
        for row, kept in enumerate(posed.penalty.mask):
            best[row, kept] = torch.linalg.solve(
                exactly.quadratic.gram[kept][:, kept], exactly.quadratic.cross[row, kept]
            )
    else:
        best = FISTA(0.0, 150, check_every=1000, precise=False).solve(exactly).weight
    weight = (best * (1 + distance * random(seed, *best.shape))).float()
    return weight, exactly.value(weight.double()) - exactly.value(best)


def certified(posed: Problem, weight: Tensor, format: precision.CertificateFormat) -> Certificate:
    fresh = Problem(posed.quadratic * 1.0, posed.penalty)
    with certifying_in(format):
        return certify(fresh, weight)


@pytest.mark.parametrize("penalty", ["support", "L1"])
@settings(max_examples=40)
@given(
    seed=seeds, m=st.integers(1, 4), n=st.integers(2, 12), damping=st.sampled_from([0.05, 0.3]),
    distance=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
)  # fmt: skip
def test_a_gap_in_parts_is_a_bound_and_nearly_as_tight(
    penalty: str, seed: int, m: int, n: int, damping: float, distance: float
):
    posed = problem(seed, m, n, damping, penalty)
    weight, excess = near(posed, seed, distance)
    found, reference = certified(posed, weight, "parts"), certified(posed, weight, "float64")
    assert found.primal == pytest.approx(reference.primal, rel=1e-6)
    assert found.gap >= excess - UNSEEN * found.primal
    assert found.gap <= TIGHT * reference.gap + 1e-6 * found.primal


class Formats(TorchDispatchMode):
    """Which functions of matrices get float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name in ("mm", "addmm") or name.startswith(("linalg_cholesky", "linalg_solve", "cholesky")):
            self.seen |= {name} if args[0].dtype == torch.float64 and args[0].shape[-1] > 1 else set()
        return func(*args, **(kwargs or {}))


def test_nothing_that_costs_as_much_as_a_product_is_in_float64():
    posed = problem(3, 4, 12, 0.1, "support")
    weight, _ = near(posed, 3, 1e-3)
    with Formats() as usual:
        certified(posed, weight, "float64")
    with Formats() as formats:
        certified(posed, weight, "parts")
    assert usual.seen and not formats.seen


@pytest.mark.parametrize("n", [40, 300])
def test_the_factor_of_float32_leaves_room_below_the_matrix(n: int):
    x = random(n, n, n) * torch.logspace(-1.2, 0, n, dtype=torch.float64)[:, None]
    gram = (x @ x.T / n).float()
    quadratic = Quadratic(gram, gram[:1] * 0, gram[:1, 0].abs()).unit_free[0]
    quadratic.gram.diagonal().mul_(1.02)
    inverse = in_parts.Inverse.of(quadratic)
    assert inverse is not None
    rest = quadratic.gram.float().double() - inverse.lower.double() @ inverse.lower.double().T
    assert torch.linalg.eigvalsh(rest).min() >= inverse.least


def test_what_float32_cannot_tell_from_singular_is_certified_in_float64():
    posed = problem(0, 2, 6, 0.0, "L1")
    gram = posed.quadratic.gram.clone()
    gram[1], gram[:, 1] = gram[0], gram[:, 0]
    gram[1, 1] = gram[0, 0]
    flat = Problem(Quadratic(gram, posed.quadratic.cross * 0, posed.quadratic.energy), posed.penalty)
    weight = random(0, 2, 6).float()
    assert certified(flat, weight, "parts") == certified(flat, weight, "float64")


def test_a_gap_knows_what_its_residual_does_not(monkeypatch: pytest.MonkeyPatch):
    posed = problem(5, 3, 10, 0.1, "support")
    weight, excess = near(posed, 5, 1e-6)
    fine = certified(posed, weight, "parts").gap
    monkeypatch.setattr(in_parts, "OF_RESIDUAL", 4)
    monkeypatch.setattr(in_parts, "OF_PRICE", 2)
    coarse = certified(posed, weight, "parts").gap
    assert excess <= fine < coarse


def test_by_default_parts_are_for_gpus_with_slow_float64(monkeypatch: pytest.MonkeyPatch):
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert not certifies_in_parts(single)
    for capability, fast in (((8, 9), False), ((8, 6), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert capabilities.has_fast_doubles.__wrapped__(torch.device("cuda")) == fast
    monkeypatch.setattr(precision, "has_fast_doubles", lambda _: False)
    monkeypatch.setattr(precision, "has_wide_sums", lambda _: True)
    assert certifies_in_parts(single) and not certifies_in_parts(double)
    with certifying_in("float64"):
        assert not certifies_in_parts(single)
