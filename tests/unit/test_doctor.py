"""The doctor finds a machine well that is, and tells what is not."""

import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from convexprune import _cli as cli
from convexprune import errors
from convexprune._device import kernels as room
from convexprune._doctor import answers, checkup
from convexprune._doctor.answers import Sizes
from convexprune._doctor.checkup import doctor
from convexprune._schema.functions import CHECKS
from convexprune.pruners import METHODS, Wanda

TINY = Sizes("cpu", hidden=32, length=32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sizes, "on", lambda device: TINY)
    forking = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))  # starts at once
    monkeypatch.setattr(checkup, "multiprocessing", forking)


def test_a_cpu_is_well():
    found = doctor(device="cpu")
    assert not found.failed, list(found.verdict())
    assert {row.check for row in found.rows} == {*CHECKS}
    assert {row.case for row in found.rows if row.check == "answers"} >= METHODS.keys() - {"reap", "shortgpt"}
    told = json.loads(json.dumps(found.to_json()))
    assert told["passed"] and len(told["rows"]) == len(found.rows)
    assert told["verdict"][0].startswith("convexprune ") and "torch " in told["verdict"][0]
    assert told["verdict"][-1].startswith("19 of 19 checks passed on cpu, 1 threads")


def test_a_gpu_has_its_compiler_its_memory_and_a_pool_checked():
    sizes = replace(TINY, device="cuda")
    checks = [*answers.checks_of_answers(sizes), *checkup.checks_of_runs(sizes, Path())]
    assert {check.case for check in checks} >= {"compiler", "memory", "a pool, the same bits"}


def test_the_memory_of_a_run_is_compared_with_the_forecast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = checkup.TwoLayers(TINY, tmp_path)
    for factor, passed in ((1, True), (20, False)):
        monkeypatch.setattr(checkup, "inspect", lambda *_, **__: SimpleNamespace(needed=1 << 30))
        model.__dict__["report"] = SimpleNamespace(memory={"gpu": factor << 30})
        assert model.memory().passed is passed


@pytest.mark.long
def test_what_cannot_be_measured_is_a_row_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "second_moments", lambda *_: [][0])
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, ["doctor", "--device", "cpu", "--checks", "answers"])
    assert result.exit_code == 1
    assert result.stdout.count("IndexError: list index out of range") == 4  # in the table, and below it
    assert re.search(r"(\d+) of (\d+) checks passed", result.stdout)


@pytest.mark.long
def test_a_zero_too_many_and_a_wrong_error_are_found(monkeypatch: pytest.MonkeyPatch):
    class Careless(Wanda):
        def prune(self, problem):
            edit = super().prune(problem)
            if problem.weight.dtype == torch.float64:
                return edit
            weight = edit.weight.clone()
            weight[0] = 0
            return replace(edit, weight=weight)

    monkeypatch.setitem(METHODS, "wanda", Careless)
    (row,) = [row for row in doctor(device="cpu", checks="answers").failed]
    assert row.case == "wanda" and row.measured.numbers["zeros"] > row.measured.numbers["asked"]
    assert row.measured.numbers["difference"] > answers.LARGEST_DIFFERENCE


def test_a_run_of_other_bits_and_a_run_that_ends_otherwise_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkup, "prune", lambda **_: SimpleNamespace(report=None))
    monkeypatch.setattr(checkup, "_checksums", lambda folder: {"model.safetensors": folder.name})
    failed = {row.case: row.measured.said for row in doctor(device="cpu", checks=("runs",)).failed}
    assert failed["twice, the same bits"] == "1 files of weights, 1 differ: model.safetensors"
    assert failed["killed and resumed, the same bits"] == "the run that was to be killed ended with 0"


def test_a_check_that_there_is_not_is_refused():
    with pytest.raises(errors.RecipeError, match=r"checks.*'answer': Input should be 'kernels'"):
        doctor(checks=("answer",))


def failing(function, **_):
    def run(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand more")

    return run


def test_without_a_compiler_work_goes_on_op_by_op_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(room, "_failures", [])
    monkeypatch.setattr(room, "has_kernels", lambda device: True)
    monkeypatch.setattr(torch, "compile", failing)
    double = room.fused(lambda x: x * 2)
    assert double(torch.ones(2)).tolist() == double(torch.ones(2)).tolist() == [2, 2]
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.getMessage() and "and more" not in record.getMessage()


def test_a_run_knows_before_it_begins_whether_kernels_are_compiled(monkeypatch, caplog):
    monkeypatch.setattr(room, "_failures", [])
    monkeypatch.setattr(room, "_try_to_compile", lambda _: room._failures.append("no gcc"))
    assert room.eager_because("cpu") is None
    monkeypatch.setattr(room, "has_kernels", lambda device: False)
    assert "pip install triton" in str(room.eager_because("cuda"))
    monkeypatch.setattr(room, "has_kernels", lambda device: True)
    assert "torch.compile failed (no gcc)" in str(room.eager_because("cuda")) and not caplog.records


def test_what_fails_op_by_op_as_well_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "_failures", [])
    monkeypatch.setattr(room, "has_kernels", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(RuntimeError, match="size"):
        room.fused(lambda x, y: x + y)(torch.ones(2), torch.ones(3))
    assert not room._failures
