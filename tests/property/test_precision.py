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
from convexprune._device.precision import add_gram, add_product, bare_product, product, solving_in, summing_in
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


PARTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.T,
    "every second row": lambda x: x[::2],
    "some columns": lambda x: x[:, 1:],
    "the same row": lambda x: x[:1].expand(30, 70),
}


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch comes without oneDNN")
@pytest.mark.parametrize("other", ["rows", "columns", "some columns"])
@pytest.mark.parametrize("part", PARTS)
def test_large_products_are_in_full_float32_by_either_library(part: str, other: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "_LARGE", 0)
    monkeypatch.setattr(room, "prefers_onednn", lambda: True)
    a = PARTS[part](random(0, 60, 70).float() * (1 + 2.0**-12))
    b = PARTS[other](random(1, *((33, a.shape[1]) if other == "columns" else (a.shape[1], 33))).float())
    whole = {"rows", "columns"}
    assert room._by_onednn(a, b) == (part in whole and other in whole)
    total = random(2, len(a), b.shape[1]).float()
    exact, reach = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    gram, out = torch.ones(a.shape[1], a.shape[1]), torch.empty_like(total)
    add_gram(gram, a, a)
    assert add_product(total, a, b, alpha=-1, out=out) is out
    for found, right, size in (
        (product(a, b), exact, reach),
        (bare_product(a, b), exact, reach),
        (out, total - exact, reach + total.abs()),
        (gram, 1 + a.double().T @ a.double(), 1 + a.double().abs().T @ a.double().abs()),
    ):
        assert found.dtype == torch.float32 and ((found - right).abs() <= 2.0**-20 * size).all()
    moments = Moments(a.shape[1])
    moments.add(a)
    wide = a.double()
    assert ((moments.gram * len(a) - wide.T @ wide).abs() <= 2.0**-19 * wide.abs().T @ wide.abs()).all()
    leaf = a.clone().requires_grad_()
    assert product(leaf, b).requires_grad and torch.equal(product(a.double(), b.double()), exact)


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
