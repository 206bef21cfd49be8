"""What a GPU must do as a CPU does: `pytest -m gpu` on a machine that has one; without one they are skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_cases import PATTERNS, correlated, layer_problem
from runs import checksums
from strategies import Layer
from torch import Tensor

import convexprune
from convexprune._doctor.checkup import doctor
from convexprune._schema.functions import CHECKS
from convexprune.constraints import SemiStructured
from convexprune.pruners import PRUNERS, Convex, LayerProblem
from convexprune.validation._formats import FORMATS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

WINDOWS = torch.randint(2, 500, (5, 16), generator=torch.Generator().manual_seed(3))


def _problem(pattern: str, device: str) -> LayerProblem:
    layer = correlated(0, m=6, change=0.3)
    here = Layer(*(values.to(device) for values in (layer.weight, layer.pruned, layer.dense)))
    return layer_problem(here, PATTERNS[pattern])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_gives_the_pattern_and_the_error_that_it_gives_on_the_cpu(name: str, pattern: str):
    found = PRUNERS[name]().prune(_problem(pattern, "cuda"))
    exact = _problem(pattern, "cpu")
    expected = PRUNERS[name]().prune(exact)
    assert int((~found.mask).sum()) == exact.pattern.zeros(6, 16)
    here = exact.squared_error(found.weight.cpu()).sum()
    torch.testing.assert_close(here, exact.squared_error(expected.weight).sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_problems_side_by_side_have_the_errors_that_they_have_on_the_cpu(pattern: str):
    problem, exact = _problem(pattern, "cuda"), _problem(pattern, "cpu")
    (expected,) = Convex().prune_all([exact])
    for found in Convex().prune_all([problem] * 3):
        here = exact.squared_error(found.weight.cpu()).sum()
        torch.testing.assert_close(here, exact.squared_error(expected.weight).sum(), rtol=1e-2, atol=0)


def test_a_run_gives_the_same_bits_twice_and_every_solve_is_certified(dense: Path, tmp_path: Path):
    settings: dict[str, Any] = {"dataset": WINDOWS, "num_calibration_samples": 4, "device": "cuda"}
    results = [convexprune.prune(dense, output_dir=tmp_path / name, **settings) for name in ("first", "second")]
    assert checksums(tmp_path / "first") == checksums(tmp_path / "second")
    assert all((r.report.largest_gap or 1) <= 1e-4 for r in results)


@pytest.mark.parametrize("check", CHECKS)
def test_the_doctor_finds_nothing(check: str):
    found = doctor(device="cuda", checks=(check,))
    assert found.rows and not found.failed, list(found.verdict())


ABSENT = {name: "another layout" for name in FORMATS if name.startswith("int4")}


def _two_of_four() -> Tensor:
    return SemiStructured(2, 4).project(torch.randn(128, 256, generator=torch.Generator().manual_seed(0))).cuda()


@pytest.mark.parametrize("name", ABSENT)
def test_a_format_of_bench_that_is_not_there_says_why(name: str):
    assert ABSENT[name] in (FORMATS[name].why_not(_two_of_four()) or "")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ABSENT])
def test_a_format_of_bench_multiplies_by_its_weight(name: str):
    weight = _two_of_four()
    assert FORMATS[name].why_not(weight) is None
    product, x = FORMATS[name](weight, None), torch.randn(64, 256, device="cuda")
    y = product(x.to(product.dtype)).float()
    assert (y - x @ weight.T).norm() <= 2e-2 * y.norm()
