"""Every file operation and every allocation of a run fails in turn.

What follows is one clear error or a result, and then, resumed, the very bits of a run that was left in peace. The slow
tests do so with every single one, and print how many there were (`pytest -m slow -s tests/test_crash.py`).
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crash import Memory, failing, stratified, watched
from runs import SETTINGS
from transformers import LlamaConfig, LlamaForCausalLM

import convexprune
from convexprune import errors
from convexprune.pipeline import executors, task, tensors

QUICK = SETTINGS | {"method": "wanda", "bound_rows": 0}
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
        self.model, self.mode, self.out = model, mode, folder / "out"
        self.roots = (model, self.out)
        self.log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)  # of all processes
        self.counts = Counter[tuple[str, str]]()
        self.run()
        self.expected = _found(self.out)

    def run(self, resume: bool = False) -> None:
        settings = QUICK | MODES[self.mode] | ({"executor": "serial", "workers": None} if resume else {})
        if not resume:
            shutil.rmtree(self.out, ignore_errors=True)
        convexprune.prune(self.model, output_dir=self.out, resume=resume, **settings)

    def watched(self, last: int | None = None, lasting: bool = False) -> list[str]:
        """Run, in the pool within a worker, and let operation `last` fail, and if it is `lasting` all after it.

        Returns:
            what kinds of operations there were.
        """
        os.ftruncate(self.log, 0)
        count = 0

        def tell(kind: str, path: Path, *_: Any) -> None:
            nonlocal count
            count += 1
            os.write(self.log, f"{kind}\n".encode())
            if last is not None and (count > last if lasting else count == last + 1):
                raise failing(kind, path)

        with watched(self.roots, tell) if self.mode != "pool" else _first_fork(self.roots, tell):
            self.run()
        return os.pread(self.log, os.fstat(self.log).st_size, 0).decode().split()

    def check(self, what: str, disturbed: Callable[[], object]) -> None:
        """After what was `disturbed` there is a result or one clear error, and resumed it is as it would have been."""
        try:
            disturbed()
            end = "as if nothing had been"
        except errors.ConvexpruneError as error:
            assert len(str(error)) < 1000
            end = "clear error"
        self.run(resume=True)
        assert _found(self.out) == self.expected, f"{what}: {end}"
        self.counts[what, end] += 1


def _found(folder: Path) -> dict[str, Any]:
    """All that a result says: the checksum of each file, and of the report what no clock has a part in."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    report = json.loads((folder / "report.json").read_text())
    told = [{name: o[name] for name in ("name", "zeros", "relative_error")} for o in report["operators"]]
    return files | {"report.json": told}


@contextmanager
def _first_fork(roots: Iterable[Path], tell: Callable[..., None]) -> Iterator[None]:
    """Inside, workers of a pool are forks, so that they are quick, and the first of them is watched."""
    forks, started = multiprocessing.get_context("fork"), list[Any]()

    def process(target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> Any:
        def do(*args: Any) -> None:
            with watched(tuple(roots), tell):
                target(*args)

        started.append(forks.Process(target=target if started else do, args=args, daemon=daemon))
        return started[-1]

    context = SimpleNamespace(Pipe=forks.Pipe, Process=process)
    with pytest.MonkeyPatch.context() as patch:
        forking = vars(multiprocessing) | {"get_context": lambda _: context}
        patch.setattr(executors, "multiprocessing", SimpleNamespace(**forking))
        patch.setattr(executors, "POLL", 0.01)
        yield


def _operations_fail(trial: Trial, moments: Iterable[int], kinds: list[str], lasting: bool) -> None:
    for moment in moments:
        trial.check(kinds[moment], lambda moment=moment: trial.watched(moment, lasting))


@pytest.mark.parametrize(("mode", "step"), [("serial", 1), ("sequential", 3), ("pool", 5)])
def test_an_operation_that_fails_is_one_clear_error_and_the_run_goes_on(small: Path, tmp_path: Path, mode, step):
    trial = Trial(small, tmp_path, mode)
    kinds = trial.watched()
    moments = stratified(kinds, 2)[::step]
    _operations_fail(trial, moments[::2], kinds, lasting=False)
    _operations_fail(trial, moments[1::2], kinds, lasting=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lasting", [False, True])
def test_every_operation_fails_in_turn(small: Path, tmp_path: Path, mode, lasting):
    trial = Trial(small, tmp_path, mode)
    kinds = trial.watched()
    _operations_fail(trial, range(len(kinds)), kinds, lasting)
    _print_table(f"{mode}, {'it and all after it fail' if lasting else 'one fails'}", trial.counts)


@contextmanager
def _short_of(memory: Memory) -> Iterator[None]:
    """Inside, what the task of a layer allocates is counted, and fails after the last one."""
    prune_layer_task = task.prune_layer_task

    def counted(*args: Any) -> None:
        with memory:
            prune_layer_task(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "prune_layer_task", counted)
        patch.setattr(tensors, "bytearray", memory.bytearray, raising=False)
        yield


def _memory_runs_out(trial: Trial, moments: Callable[[int], Iterable[int]]) -> None:
    def lacking(last: float) -> int:
        with _short_of(memory := Memory(last)):
            trial.run()
        return memory.count

    for last in moments(lacking(float("inf"))):
        with pytest.raises(errors.PruningError, match=r"Memory ran out.*--resume.*--batch-size"):
            lacking(last)
        trial.check("allocation", lambda: None)


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
