"""Calibration that says nothing is refused; too little of it, and what a model is beforehand, is told and reported."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from door import SMALL, TOKENS
from torch import nn

import convexprune
from convexprune import errors
from convexprune._api.given import run_warnings
from convexprune.adapters import calibration_and_held_out
from convexprune.adapters._data.rows import refuse_uninformative, shortage
from convexprune.recipe import make_recipe
from convexprune.report import Report

QUICK: dict[str, Any] = {"method": "wanda"}
NOTHING = {
    "one token": torch.full((400,), 7),
    "one word": torch.tensor([7, 8, 9]).repeat(400),
    "two windows of one token": torch.full((4, 2), 7),
}


@pytest.mark.parametrize("case", NOTHING)
def test_tokens_that_say_nothing_are_refused(build, case: str):
    length: dict[str, Any] = {"max_seq_length": 16} if NOTHING[case].dim() == 1 else {}
    for door in (convexprune.prune, convexprune.permute):
        with pytest.raises(errors.CalibrationError, match=r"says nothing to calibrate on: [13] different tokens"):
            door(build("llama"), dataset=NOTHING[case], num_calibration_samples=4, **length)


@pytest.mark.parametrize("text", ["hello " * 2000, "\n" * 5000, "aaaaaaa" * 3000])
def test_text_that_says_nothing_is_refused(tiny_opt, text: str):
    with pytest.raises(errors.CalibrationError, match="over and over"):
        calibration_and_held_out([text], tiny_opt, num_samples=4, max_seq_length=16, seed=0)[0]


def test_a_file_with_nul_bytes_is_no_text(tiny_opt, tmp_path: Path):
    for name, content in {"zeros": b"\0" * 5000, "utf16": "In a hole in the ground".encode("utf-16-le")}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
        with pytest.raises(errors.CalibrationError, match=rf"{name}\.txt: holds NUL bytes"):
            calibration_and_held_out(tmp_path / f"{name}.txt", tiny_opt, num_samples=1, max_seq_length=4, seed=0)[0]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (TOKENS, None),  # 144 tokens
        (TOKENS[:4], "96 calibration tokens for operators of up to 100 inputs: .* of 5 at least"),
        # 68 + 10 of 85 runs are different, so what repeats others asks for a window more.
        (
            torch.cat([TOKENS[:4], TOKENS[:1]]),
            "120 calibration tokens .* of 6 at least",
        ),
        (torch.arange(13).repeat(99)[:1200].view(10, 120), "1,200 calibration tokens, 1% of them not repeated,"),
        (torch.randint(0, 4, (10, 120), generator=torch.Generator().manual_seed(0)), None),  # four letters, as of DNA
    ],
)
def test_fewer_tokens_than_inputs_are_told_with_the_number_needed(windows, message: str | None):
    refuse_uninformative(windows)
    told = shortage(windows, 100)
    assert told is None if message is None else re.match(message, str(told))


def test_a_run_says_what_it_is_short_of_and_its_report_too(build, tmp_path: Path, caplog):
    settings: dict[str, Any] = SMALL | QUICK | {"num_calibration_samples": 1, "held_out_samples": 0}
    whole = convexprune.prune(build("llama"), **settings).report
    written = convexprune.prune(build("llama"), output_dir=tmp_path / "out", **settings).report
    (told,) = whole.warnings
    assert told.startswith("24 calibration tokens for operators of up to 48 inputs") and "of 2 at least" in told
    assert written.warnings == whole.warnings == [told]
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()).warnings == [told]
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"].count(told) == 2


def test_operators_that_share_their_weights_are_told(build):
    model = build("llama")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = nn.Parameter(first.weight.data[:, :])
    (told,) = convexprune.prune(model, **SMALL, **QUICK).report.warnings
    assert told.startswith("2 operators are left as they are")
    assert "layers.0.mlp.up_proj is tied to model.layers.1" in told
    assert convexprune.prune(build("llama-tied"), **SMALL, **QUICK).report.warnings == []  # a head tied as usual


@pytest.mark.parametrize("folder", [True, False])
def test_a_model_that_had_more_zeros_than_it_is_asked_for_is_told(build, tmp_path: Path, folder: bool):
    model = build("llama")
    convexprune.prune(model, sparsity=0.7, **SMALL, **QUICK)
    report = convexprune.prune(
        model, sparsity=0.3, output_dir=tmp_path / "out" if folder else None, **SMALL, **QUICK
    ).report
    (told,) = report.warnings
    assert told.startswith("14 operators had more zeros before than they were asked for (70.0%; asked 30.0%, now ")
    assert all(o.dense_zeros == round(0.7 * o.outputs * o.inputs) for o in report.operators)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"solver": "cvxpy"}, "solver='cvxpy' solves row by row"),
        ({"bound_rows": 10**5}, "bound_rows=100000: all rows are bounded of operators with"),
        ({}, None),
    ],
)
def test_settings_that_may_not_be_what_was_meant_are_told(tiny_llama, settings: dict[str, Any], told: str | None):
    windows = {"calibration": torch.randint(0, 90, (20, 16), generator=torch.Generator().manual_seed(0))}
    found = list(run_warnings(tiny_llama, windows, make_recipe(model="", **settings)))
    assert [text.startswith(told) for text in found] == [True] if told else found == []
