"""The doctor finds a machine well that is, and tells what is not."""

import json
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from convexprune import _cli as cli
from convexprune import errors
from convexprune._device import kernels as room
from convexprune._doctor import answers, runs, speeds
from convexprune._doctor.check import Bed
from convexprune._doctor.checkup import doctor
from convexprune._schema.measures import CHECKS
from convexprune.pruners import METHODS, Wanda

TINY = Bed("cpu", 64, (32,), 32, 8, (16, 64), (48, 192), 1 << 10, 32, 32, 0.0, (2, 8, 32))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bed, "of", lambda device: TINY)
    forking = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))  # starts at once
    monkeypatch.setattr(runs, "multiprocessing", forking)


def test_a_cpu_is_well(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speeds, "SLOWEST_MASK", 1e9)
    found = doctor(device="cpu")
    assert not found.failed, list(found.verdict())
    assert {row.check for row in found.rows} == {*CHECKS} - {"copies"}  # a CPU has one memory
    assert {row.case for row in found.rows if row.check == "answers"} >= METHODS.keys() - {"reap", "shortgpt"}
    told = json.loads(json.dumps(found.to_json()))
    assert told["passed"] and len(told["rows"]) == len(found.rows)
    assert told["verdict"][-1].startswith("24 of 24 checks passed on cpu, 1 threads")


def test_the_checks_of_a_gpu_are_made_on_a_cpu_that_says_it_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Bed, "on_gpu", True)
    monkeypatch.setattr(speeds, "_memory", lambda bed: 1 << 30)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    found = doctor(device="cpu", checks="kernels,products,copies")
    assert {(row.check, row.case) for row in found.rows} == {
        *(("kernels", name) for name in ("compiler", "ahead", "strengths", "shrink", "refit", "parts")),
        *(("products", name) for name in ("float64", "float32", "bfloat16", "tf32", "bf16x3")),
        ("copies", "to the device"), ("copies", "to the host"),
    }  # fmt: skip
    assert all("Error" not in row.found.said for row in found.rows), list(found.verdict())


def test_what_cannot_be_measured_is_a_row_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speeds, "mask", lambda *_: [][0])
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, ["doctor", "--device", "cpu", "--checks", "masks"])
    assert result.exit_code == 1
    assert result.stdout.count("IndexError: list index out of range") == 4  # in the table, and below it
    assert "2 of 4 checks passed" in result.stdout


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
    assert row.case == "wanda" and row.found.numbers["zeros"] > row.found.numbers["asked"]
    assert row.found.numbers["difference"] > answers.LARGEST_DIFFERENCE


def test_a_run_of_other_bits_and_a_run_that_ends_otherwise_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "prune", lambda **_: None)
    monkeypatch.setattr(runs, "_checksums", lambda folder: {"model.safetensors": folder.name})
    failed = {row.case: row.found.said for row in doctor(device="cpu", checks=("runs",)).failed}
    assert failed["twice, the same bits"] == "1 files of weights, 1 differ: model.safetensors"
    assert failed["killed and resumed, the same bits"] == "the run that was to be killed ended with 0"


def test_a_check_that_there_is_not_is_refused():
    with pytest.raises(errors.RecipeError, match="Unknown check 'mask'"):
        doctor(checks=("mask",))


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
