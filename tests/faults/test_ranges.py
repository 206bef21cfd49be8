"""Devices, number formats and numbers out of range are refused by the functions at once, whatever door they come by."""

import os
import subprocess
import sys
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import convexprune
from convexprune import _cli as cli
from convexprune import errors
from convexprune._device.machine import check_threads, default_device
from convexprune._runs.executors import RANKS
from convexprune.adapters._inspection.inspection import inspect
from convexprune.recipe import make_recipe
from convexprune.validation import compare, verify
from convexprune.validation._bench import bench
from convexprune.validation._variants import make_variants

NOWHERE = Path("nowhere")  # no model is looked for before these checks


def compared(**settings: Any) -> None:
    plain = {"methods": ["wanda"], "sparsities": [0.5], "patterns": ["unstructured"], "conventions": ["own"]}
    compare(NOWHERE, output=NOWHERE, **{**plain, "plots": False, **settings})


DOORS = {
    "prune": lambda **settings: convexprune.prune(NOWHERE, **settings),
    "permute": lambda **settings: convexprune.permute(NOWHERE, **settings),
    "verify": lambda **settings: verify(NOWHERE, **settings),
    "compare": compared,
    "inspect": lambda **settings: inspect(NOWHERE, **settings),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps", "", "cpu:5"])
def test_a_device_that_is_not_here_is_refused_and_those_that_are_named(door: str, device: str):
    with pytest.raises(errors.RecipeError, match=f"device='{device}' is not here. Known: auto, cpu"):
        DOORS[door](device=device)


@pytest.mark.parametrize("door", DOORS)
def test_a_number_format_is_refused_alike_by_all(door: str):
    with pytest.raises(errors.RecipeError, match="dtype='int8': Input should be 'float32', 'bfloat16' or 'float16'"):
        DOORS[door](dtype="int8")


def test_torchs_own_objects_are_taken():
    recipe = make_recipe(model="", device=torch.device("cuda", 1), dtype=torch.bfloat16)
    assert (recipe.device, recipe.dtype, recipe.torch_dtype) == ("cuda:1", "bfloat16", torch.bfloat16)
    assert default_device(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("door", "settings"),
    [
        ("prune", {"workers": 0, "executor": "pool", "output_dir": "out"}),
        ("prune", {"workers": -2, "executor": "pool", "output_dir": "out"}),
        ("prune", {"seed": 2**63}),
        ("prune", {"seed": -1}),
        ("permute", {"seed": 2**63}),
        ("verify", {"sample": -1}),
        ("verify", {"rows": 0}),
        ("verify", {"columns": -3}),
        ("verify", {"bound_rows": -3}),
        ("verify", {"tolerance": -1}),
        ("verify", {"tolerance": nan}),
        ("verify", {"gap": nan}),
        ("verify", {"seed": -1}),
        ("compare", {"eval_windows": -2}),
        ("compare", {"eval_window": 1}),
        ("compare", {"seed": 2**63}),
        ("inspect", {"num_calibration_samples": 0}),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(door: str, settings: dict[str, Any]):
    with pytest.raises(errors.RecipeError, match=next(iter(settings))):
        DOORS[door](**settings)


@pytest.mark.parametrize("executor", ["serial", "ranks"])
def test_workers_that_would_not_be_used_are_refused(executor: str):
    with pytest.raises(errors.RecipeError, match=f"workers=4: executor='{executor}'"):
        convexprune.prune(NOWHERE, executor=executor, workers=4, output_dir="out")


@pytest.mark.parametrize("names", RANKS)
@pytest.mark.parametrize(
    ("rank", "size"), [("5", "2"), ("2", "2"), ("-1", "2"), ("a", "2"), ("", "2"), ("0", "0"), ("0", "")]
)
def test_ranks_that_no_launcher_gives_are_refused_at_once(monkeypatch, names: tuple[str, str], rank: str, size: str):
    for name in (name for pair in RANKS for name in pair):
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(names, (rank, size), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        errors.RecipeError, match=f"{names[0]}='{rank}', {names[1]}='{size}'.* from 0 to {names[1]} - 1"
    ):
        convexprune.prune(NOWHERE, executor="ranks", output_dir="out")


@pytest.mark.parametrize("seconds", [inf, nan, 1e300, 0])
def test_a_time_to_measure_has_an_end(seconds: float):
    with pytest.raises(errors.RecipeError, match="seconds="):
        bench(NOWHERE, seconds=seconds)


def test_an_entry_that_is_refused_is_told_once():
    with pytest.raises(errors.RecipeError) as refused:
        bench(NOWHERE, batches=(8, 0))
    assert str(refused.value) == "batches.1=0: Input should be greater than or equal to 1."


@pytest.mark.parametrize(
    ("given", "came"), [({}, "none is given"), ({"bits": 3, "speed": 2}, "bits and speed are given")]
)
def test_advice_is_for_one_target(given: dict[str, float], came: str):
    with pytest.raises(errors.RecipeError, match=f"a single target, and {came}"):
        convexprune.advise(NOWHERE, **given)


def test_threads_have_a_limit_that_is_said():
    most = 8 * (os.cpu_count() or 1)
    check_threads(most)
    with pytest.raises(errors.RecipeError, match=f"at most {most} threads"):
        convexprune.prune(NOWHERE, threads=most + 1)


def test_a_quota_that_a_pattern_does_not_have_is_refused_and_in_compare_is_for_the_others():
    with pytest.raises(errors.PatternError, match="2:4 has a quota of its own in every group of 4"):
        convexprune.prune(NOWHERE, pattern="2:4", quota="row")
    made = make_variants(["wanda"], [0.5], ["unstructured", "2:4"], ["own"], quota="row")
    assert [variant.quota for variant in made] == ["row", "matrix"]


@pytest.mark.parametrize(
    "settings", [{"methods": ["wanda", "wanda"]}, {"sparsities": [0.5, 0.5]}, {"allocations": ["own", "own"]}]
)
def test_what_is_named_twice_is_refused(settings: dict[str, Any]):
    with pytest.raises(errors.RecipeError, match=r"twice\. Leave one of them out"):
        compared(**settings)


def test_a_name_in_other_letters_is_guessed():
    assert "Did you mean 'sparsegpt'" in errors.unknown("method", "SparseGPT", ["wanda", "sparsegpt"])


@pytest.mark.parametrize("extra", ["hub", "gguf", "ray", "plot"])
def test_a_hint_installs_the_packages_of_an_extra(extra: str):
    command = errors.install_hint(extra)
    assert command.startswith("pip install ") and "convexprune" not in command and ";" not in command


def test_the_version_is_told_and_so_is_help():
    told = CliRunner().invoke(cli.app, ["--version"])
    assert told.exit_code == 0 and told.output.startswith("0.")
    assert all("Usage" in CliRunner().invoke(cli.app, [*command, "-h"]).output for command in ([], ["prune"]))
    module = subprocess.run([sys.executable, "-m", "convexprune", "--version"], capture_output=True, check=True)
    assert module.stdout.decode() == told.output
