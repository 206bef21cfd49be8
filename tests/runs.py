"""A small run in a folder that the tests of runs share: settings, checksums, and processes to kill."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import convexprune
from convexprune._progress import Event, OnProgress
from convexprune.report import OperatorReport

LAYERS = 4
TOKENS = torch.randint(2, 500, (5, 16), generator=torch.Generator().manual_seed(3))
SETTINGS: dict[str, Any] = {
    "method": "sparsegpt", "dataset": TOKENS, "num_calibration_samples": 4, "batch_size": 2, "threads": 1,
    "bound_rows": 0,
}  # fmt: skip


def place_of(folder: Path) -> Path:
    """Where a run or a comparison of a folder is while it is unfinished."""
    return folder.with_name(f".{folder.name}.part")


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def on_reports(take: Callable[[OperatorReport], object]) -> OnProgress:
    """An `on_progress` that hands on the report of every operator."""
    return lambda event: None if event.report is None else (take(event.report), None)[1]


def stop_after(number: int) -> OnProgress:
    """An `on_progress` that stops the run like Ctrl-C once `number` layers are finished and the next one is begun."""

    def on_progress(event: Event) -> None:
        if event.report is not None and event.done == 7 * number + 1:
            raise KeyboardInterrupt

    return on_progress


def require_resumed(source: Path, folder: Path, **settings: Any) -> None:
    """A run that is interrupted at its first operator, and resumed, ends with the files of one that was not."""

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    whole = convexprune.prune(source, **settings, output_dir=folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(source, **settings, output_dir=folder / "again", on_progress=on_reports(stop))
    again = convexprune.prune(source, **settings, output_dir=folder / "again", resume=True)
    names = [name for name in whole.report.files if name != "recipe.yaml"]
    assert names and [again.report.files[name] for name in names] == [whole.report.files[name] for name in names]


def flip(path: Path) -> None:
    """Another bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """A file without its end."""
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    """A file of no bytes."""
    path.write_bytes(b"")


def forked(run: Callable[[], object]) -> int:
    """The number of a process that runs `run`, and says on the way out whether it could."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def killed(run: Callable[[], object], after: float | None = None) -> int:
    """The exit status of a process that runs `run`, and is killed after so many seconds."""
    child = forked(run)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
