"""Products in coarse formats are as near as their bits say, a CPU's default is float32, and certificates stay exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from runs import SETTINGS, checksums
from strategies import random, seeds
from torch import Tensor

import convexprune
from convexprune._device import precision as room
from convexprune._device.capabilities import has_bfloat16
from convexprune._device.precision import add_gram, add_product, product, solving_in, summing_in
from convexprune._device.switches import restored
from convexprune.constraints import Unstructured
from convexprune.core import _symmetric as triangle
from convexprune.core._certificate import certify
from convexprune.core._moments import Moments
from convexprune.core._problem import Problem
from convexprune.pruners import Convex
from convexprune.solvers._fista import FISTA

BITS = {"float32": 24, "bf16x3": 16, "tf32": 11}


def matrices(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return random(seed, 5, 7).float(), random(seed + 1, 5, 9).float(), random(seed + 2, 9, 7).float()


@given(seeds, st.sampled_from([*BITS]))
def test_a_product_is_as_near_as_its_bits(seed: int, name: room.Format):
    _, a, b = matrices(seed)
    with solving_in(name):
        found = product(a, b)
    reach = a.double().abs() @ b.double().abs()  # of the sum of products
    assert ((found - a.double() @ b.double()).abs() <= 2.1 * 2.0 ** -BITS[name] * reach + 1e-30).all()


@given(seeds)
def test_by_default_a_cpu_multiplies_in_float32(seed: int):
    total, a, b = matrices(seed)
    assert torch.equal(add_product(total, a, b, alpha=-1), torch.addmm(total, a, b, alpha=-1))
    with solving_in("auto"):
        assert torch.equal(product(a, b), a @ b)
    with solving_in("tf32"):
        assert torch.equal(product(a.double(), b.double()), a.double() @ b.double())  # a certificate's
        assert not torch.equal(add_product(total, a, b), torch.addmm(total, a, b))


def test_tf32_keeps_eleven_bits():
    values = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11 - 2**-20, -1 - 2**-12, 3.0e38])
    assert torch.equal(room._rounded(values), torch.tensor([1.0, 1 + 2**-10, 1.0, -1.0, room._rounded(values)[-1]]))
    assert torch.equal(
        room._rounded(values)[-1:], values[-1:].view(torch.int32).add(0x1000).bitwise_and(~0x1FFF).view(torch.float32)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_moments_of_16_bits_are_multiplied_exactly_where_sums_are_wide(dtype: torch.dtype, monkeypatch):
    x, calls = random(0, 40, 12).to(dtype), []
    plain = Moments(12)
    plain.add(x)
    real = torch.mm

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        calls.append((a.dtype, b.dtype, out_dtype))
        return real(a.to(out_dtype), b.to(out_dtype)) if out_dtype else real(a, b)

    for place in (room, triangle):
        monkeypatch.setattr(place, "has_wide_sums", lambda device: True)
    monkeypatch.setattr(torch, "mm", mm)
    wide = Moments(12)
    wide.add(x)
    assert calls and set(calls) == {(dtype, dtype, torch.float32)}
    torch.testing.assert_close(wide.gram, plain.gram, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="the CPU has no products of bfloat16")
def test_second_moments_of_bfloat16_are_multiplied_exactly_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    switch = torch.backends.mkldnn.matmul
    before, seen = switch.fp32_precision, list[str]()
    real = triangle.add_gram
    monkeypatch.setattr(triangle, "add_gram", lambda *args: (seen.append(switch.fp32_precision), real(*args)))
    whole = (random(0, 512, 200) * 40).round()  # sums stay below 2^24
    moments = Moments(200)
    moments.add(whole.bfloat16())
    assert torch.equal(moments.gram.double() * 512, whole.T @ whole)
    for other in (whole.float(), whole.half()):
        Moments(200).add(other)
    with summing_in("float32"):
        Moments(200).add(whole.bfloat16())
    assert set(seen[: triangle.STRIPS]) == {"bf16"} and set(seen[triangle.STRIPS :]) == {before}
    assert switch.fp32_precision == before
    x, plain, quick = random(1, 2048, 200).bfloat16(), Moments(200), Moments(200)
    quick.add(x)
    plain.add(x.float())
    size = plain.gram.diagonal().sqrt()
    assert ((quick.gram - plain.gram).abs() <= 1e-5 * torch.outer(size, size)).all()


def test_second_moments_are_added_up_in_the_format_that_is_named():
    x, total = random(0, 40, 12).float(), torch.zeros(12, 12)
    with summing_in("tf32"):
        add_gram(total, x, x)
    assert torch.equal(total, room._rounded(x).T @ room._rounded(x))


def test_a_solve_in_a_coarse_format_has_an_exact_certificate():
    problem = layer_problem(correlated(0, 12, 16), Unstructured(0.5))
    posed = Problem(problem.quadratic, convexprune.L1(0.1))
    for precise in (True, False):
        with solving_in("tf32"):
            solution = FISTA(precise=precise).solve(posed)
        assert solution.certificate == certify(posed, solution.weight, precise)


@pytest.mark.parametrize("name", ["tf32", "bf16x3"])
def test_a_coarse_path_ends_in_an_error_as_low(name: room.Format):
    layer = correlated(3, 24, 32)
    single = type(layer)(layer.weight.float(), layer.pruned.float(), layer.dense.float())
    problem = layer_problem(single, Unstructured(0.5))
    exact = problem.squared_error(Convex().prune(problem).weight).sum()
    with solving_in(name):
        coarse = Convex().prune(problem)
    assert problem.squared_error(coarse.weight).sum() <= 1.01 * exact  # of 768 entries few change sides
    assert coarse.solutions[-1].certificate.relative_gap <= 1e-4


def test_a_run_names_its_formats_and_a_cpu_takes_float32(dense: Path, expected: dict[str, str], tmp_path: Path):
    for name in ("float32", "tf32"):
        settings: dict[str, Any] = SETTINGS | {"gram_precision": name, "solve_precision": name}
        result = convexprune.prune(dense, output_dir=tmp_path / name, **settings)
        assert (checksums(tmp_path / name) == expected) == (name == "float32")
        assert result.report.recipe["gram_precision"] == name
    with pytest.raises(convexprune.errors.RecipeError, match="solve_precision='half'"):
        convexprune.prune(dense, solve_precision="half", dataset=SETTINGS["dataset"])


@pytest.mark.parametrize(
    "more",
    [{}, {"pattern": "2:4"}, {"pattern": "columns"}, {"prefix": "pruned"}, {"method": "admm"}, {"method": "alps"},
     {"method": "fistapruner"}, {"method": "wanda"}, {"allocation": "half-curve"}],
    ids=str,
)  # fmt: skip
def test_nothing_that_a_run_does_is_refused_by_deterministic_algorithms(more: dict[str, str], dense: Path):
    settings: dict[str, Any] = {name: value for name, value in SETTINGS.items() if name != "method"}
    settings |= {"bound_rows": 1, "targets": ["re:.*layers\\.0\\..*"]} | more
    with restored(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True):
        assert convexprune.prune(dense, **settings).report.operators
