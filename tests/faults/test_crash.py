"""Every file operation and every allocation of a run fails in turn, and the power is cut after each operation.

What follows is one clear error or a result, and then, resumed, the very bits of a run that was left in peace. The slow
tests do so with every single one, and print how many there were (`pytest -m slow -s tests/faults/test_crash.py`).
"""

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from crash import Memory, failing, forks, stratified, watched
from disk import POLICIES, Disk, put
from runs import SETTINGS, on_reports
from transformers import LlamaConfig, LlamaForCausalLM

import convexprune
from convexprune import errors
from convexprune._layerwise import pipeline
from convexprune._layerwise.walk import LayerWalk
from convexprune._rendering.page import page
from convexprune._storage import tensors
from convexprune.report import Report

QUICK = SETTINGS | {"method": "wanda"}
MODES: dict[str, dict[str, Any]] = {
    "serial": {}, "sequential": {"prefix": "pruned"}, "pool": {"executor": "pool", "workers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two layers in two shards."""
    folder = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    return folder


class Trial:
    """Runs of one mode on one model, each in the same folder, and what becomes of them."""

    def __init__(self, model: Path, folder: Path, mode: str) -> None:
        self.model, self.mode, self.here = model, mode, folder / "here"
        self.out, self.roots = self.here / "out", (model, self.here)
        self.log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)  # of all processes
        self.counts = Counter[tuple[str, str]]()
        self.run(resume=True)
        self.expected = _found(self.out)

    def run(self, resume: bool = False) -> None:
        here: dict[str, Any] = {"executor": "serial", "workers": None} if resume else {}
        settings: dict[str, Any] = QUICK | MODES[self.mode] | here
        convexprune.prune(self.model, output_dir=self.out, resume=resume, **settings)

    def clear(self) -> None:
        """Remove the result, and what was left beside it."""
        shutil.rmtree(self.here)
        self.here.mkdir()

    def watched(self, last: int | None = None, lasting: bool = False) -> list[str]:
        """Run, in the pool within a worker, and let operation `last` fail, and if it is `lasting` all after it.

        Returns:
            what kinds of operations there were.
        """
        os.ftruncate(self.log, 0)
        self.clear()
        count = 0

        def on_operation(kind: str, path: Path, *_: Any) -> None:
            nonlocal count
            count += 1
            os.write(self.log, f"{kind}\n".encode())
            if last is not None and (count > last if lasting else count == last + 1):
                raise failing(kind, path)

        watch = partial(watched, self.roots, on_operation)
        with watch() if self.mode != "pool" else forks(watch):
            self.run()
        return os.pread(self.log, os.fstat(self.log).st_size, 0).decode().split()

    def check(self, what: str, disturbed: Callable[[], object]) -> None:
        """After what was `disturbed` there is a result or one clear error, and resumed it is as it would have been."""
        error = _raised(disturbed)
        if error is not None and not isinstance(error, errors.ConvexpruneError):
            raise AssertionError(f"{what}: {error!r}") from error
        assert _raised(lambda: self.run(resume=True)) is None, f"{what}: {error}"
        assert _found(self.out) == self.expected, f"{what}: {error}"
        self.counts[what, "clear error" if error else "no error"] += 1


def _raised(run: Callable[[], object]) -> Exception | None:
    try:
        run()
    except Exception as error:
        return error
    return None


def _found(folder: Path) -> dict[str, Any]:
    """All that a result says: the checksum of each file, and of the report what no clock has a part in."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    assert (folder / "report.html").read_text() == page(Report.from_json((folder / "report.json").read_text()))
    report = json.loads((folder / "report.json").read_text())
    told = [{name: o[name] for name in ("name", "zeros", "relative_error")} for o in report["operators"]]
    return files | {"report.json": told, "report.html": None}  # the page is the report, seconds and all


def _operations_fail(trial: Trial, moments: Iterable[int], kinds: list[str], lasting: bool) -> None:
    for moment in moments:
        trial.check(kinds[moment], lambda moment=moment: trial.watched(moment, lasting))


@pytest.mark.long
@pytest.mark.parametrize(("mode", "step"), [("serial", 2), ("sequential", 3), ("pool", 5)])
def test_an_operation_that_fails_is_one_clear_error_and_the_run_goes_on(small: Path, tmp_path: Path, mode, step):
    trial = Trial(small, tmp_path, mode)
    kinds = trial.watched()
    moments = stratified(kinds, 2)[::step]
    _operations_fail(trial, moments[::2], kinds, lasting=False)
    _operations_fail(trial, moments[1::2], kinds, lasting=True)


def test_a_pool_that_loses_a_worker_tells_of_every_operator(small: Path, tmp_path: Path):
    told, folder = list[str](), tmp_path / "here" / "out"

    def deadly(kind: str, path: Path, *_: Any) -> None:
        if kind == "flock" and path.parent.name == "claims":
            os.kill(os.getpid(), signal.SIGKILL)

    settings: dict[str, Any] = (
        QUICK | MODES["pool"] | {"output_dir": folder, "on_progress": on_reports(lambda o: told.append(o.name))}
    )
    with forks(lambda: watched([folder.parent], deadly)) as workers:
        assert _raised(lambda: convexprune.prune(small, **settings)) is None
    assert workers[0].exitcode == -signal.SIGKILL and len(workers) == 2
    assert sorted(told) == sorted(o["name"] for o in _found(folder)["report.json"]) and len(told) == 14


def test_what_a_worker_raises_is_what_the_pool_raises(small: Path, tmp_path: Path):
    settings: dict[str, Any] = QUICK | MODES["pool"] | {"output_dir": tmp_path / "out"}
    with forks(lambda: patch.object(pipeline, "run_steps", side_effect=errors.PruningError("in the worker"))):
        raised = _raised(lambda: convexprune.prune(small, **settings))
    assert isinstance(raised, errors.PruningError) and str(raised) == "in the worker"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_operation_fails_in_turn(small: Path, tmp_path: Path, mode: str):
    trial = Trial(small, tmp_path, mode)
    kinds = trial.watched()
    _operations_fail(trial, range(len(kinds)), kinds, lasting=False)
    _print_table(f"{mode}: one fails", trial.counts)
    trial.counts.clear()
    _operations_fail(trial, range(0, len(kinds), 5), kinds, lasting=True)
    _print_table(f"{mode}: it and all after it fail", trial.counts)


def _power_is_cut(trial: Trial, states: Callable[[Disk], Iterable[tuple[int, str]]]) -> None:
    disk, seen = Disk(trial.here), set[int]()
    trial.clear()
    with watched([trial.here], disk.record):
        trial.run()
    assert disk.after(disk.moments, "all") == {
        path: None if path.is_dir() else path.read_bytes() for path in (trial.here, *trial.here.rglob("*"))
    }
    for moment, policy in states(disk):
        held = disk.after(moment, policy)
        if (state := hash(tuple(sorted(held.items(), key=lambda item: item[0])))) not in seen:
            seen.add(state)
            shutil.rmtree(trial.here)
            put(held)
            trial.check(policy, lambda: None)


def _at_the_end(disk: Disk) -> list[tuple[int, str]]:
    """When the result has just been finished, nothing of it may be lost any more."""
    return [(disk.moments, "names"), (disk.moments, "lost")]


@pytest.mark.parametrize("mode", ["serial", "sequential"])
def test_after_a_power_cut_the_run_goes_on(small: Path, tmp_path: Path, mode):
    trial = Trial(small, tmp_path, mode)
    _power_is_cut(
        trial, lambda disk: [(disk.moments * (i + 1) // 7, POLICIES[i]) for i in range(7)] + _at_the_end(disk)
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["serial", "sequential"])
def test_the_power_is_cut_after_every_operation(small: Path, tmp_path: Path, mode):
    trial = Trial(small, tmp_path, mode)
    _power_is_cut(trial, lambda disk: [(m, policy) for m in range(disk.moments + 1) for policy in POLICIES])
    _print_table(f"{mode}, power cuts", trial.counts)


@contextmanager
def _short_of(memory: Memory) -> Iterator[None]:
    """Inside, what the task of a layer allocates is counted, and fails after the last one."""
    visit = LayerWalk.visit

    def counted(*args: Any) -> None:
        with memory:
            visit(*args)

    own = patch.object(tensors, "bytearray", memory.bytearray, create=True)
    with patch.object(LayerWalk, "visit", counted), own:
        yield


def _memory_runs_out(trial: Trial, moments: Callable[[int], Iterable[int]]) -> None:
    def lacking(last: float) -> int:
        trial.clear()
        with _short_of(memory := Memory(last)):
            trial.run()
        return memory.count

    def told(last: int) -> None:
        with pytest.raises(errors.PruningError, match=r"Memory ran out.*--resume.*--batch-size") as error:
            lacking(last)
        raise error.value

    for last in moments(lacking(float("inf"))):
        trial.check("allocation", lambda last=last: told(last))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["serial", "sequential"])
def test_memory_that_runs_out_is_one_clear_error_and_the_run_goes_on(small: Path, tmp_path: Path, mode):
    _memory_runs_out(Trial(small, tmp_path, mode), lambda count: [i * (count - 1) // 3 for i in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["serial", "sequential"])
def test_every_allocation_fails_in_turn(small: Path, tmp_path: Path, mode):
    trial = Trial(small, tmp_path, mode)
    _memory_runs_out(trial, range)
    _print_table(f"{mode}, allocations", trial.counts)


def _print_table(title: str, counts: Counter[tuple[str, str]]) -> None:
    print(f"\n| {title} | tried | {' | '.join(ends := sorted({end for _, end in counts}))} |")
    for what in sorted({what for what, _ in counts}):
        row = [counts[what, end] for end in ends]
        print(f"| {what} | {sum(row)} | {' | '.join(map(str, row))} |")
