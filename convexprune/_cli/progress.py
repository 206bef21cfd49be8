"""Progress on stderr: a bar on a terminal; plain lines elsewhere, a line for a phase or a layer."""

import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from convexprune._cli.stopping import stoppable
from convexprune._progress import Step, followed_by

if TYPE_CHECKING:
    from convexprune.report import OnOperator, OperatorReport

QUIET = 60.0  # seconds after which a line says that a long phase goes on


@contextmanager
def working(quiet: bool, output: Path | None = None, command: str = "") -> Iterator["Bar | Lines"]:
    """Show progress, let a stopped `command` say how to go on, and hide the bars of transformers."""
    with stoppable(output, command), following(quiet=quiet) as shown:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        yield shown


@contextmanager
def following(console: Console | None = None, quiet: bool = False) -> Iterator["Bar | Lines"]:
    """Show every phase that begins, first the start of Python. A quiet command shows no warnings either."""
    if quiet:
        with _without_warnings():
            yield Lines(Console(quiet=True))
        return
    console = console or Console(stderr=True, markup=False)
    if not console.is_terminal:
        lines = Lines(console)
        lines("starting")
        with followed_by(lines):
            yield lines
        return
    with Progress(*_columns(), console=console, transient=True, expand=True) as progress:
        bar = Bar(progress)
        bar("starting")
        with followed_by(bar):
            yield bar


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide warnings and the bars of packages. Errors that end a command still appear."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _columns() -> Sequence[ProgressColumn]:
    """The description gives way where the terminal is narrow; counter and clocks never do."""
    words = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    left = TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5))
    return (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=words),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7, justify="right")),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        left,
        TextColumn("left", table_column=Column(no_wrap=True, min_width=4)),
    )


class Bar:
    """A progress bar for the current phase, with the result of the last step."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, phase: str, steps: int | None = None) -> Step:
        task = self._progress.add_task(phase, total=steps)
        self._show(task)

        def step(what: str = "") -> None:
            self._progress.update(task, advance=1, description=f"{phase}  {what}" if what else phase)
            self._show(task)

        return step

    def _show(self, task: TaskID) -> None:
        for each in self._progress.task_ids:
            self._progress.update(each, visible=each == task)

    def operators(self, total: int) -> "OnOperator":
        step = self("pruning", total)
        return lambda report: step(f"{report.name}  error {report.relative_error:.1e}")


class Lines:
    """A line as a phase begins, as a layer is pruned, and now and then while a phase goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()

    def __call__(self, phase: str, steps: int | None = None) -> Step:
        began, done = time.monotonic(), 0
        self._say(phase)

        def step(what: str = "") -> None:
            nonlocal done
            done += 1
            if time.monotonic() - self._last >= QUIET:
                self._say(f"{phase} {_count(done, steps, time.monotonic() - began)}  {what}".rstrip())

        return step

    def operators(self, total: int) -> "OnOperator":
        began, done, layer = time.monotonic(), 0, list["OperatorReport"]()
        self._say(f"pruning: {total} operators")

        def on_operator(report: "OperatorReport") -> None:
            nonlocal done
            if layer and _layer(layer[0]) != _layer(report):
                self._say(f"pruned {_count(done, total, time.monotonic() - began)}  {_summary(layer)}")
                layer.clear()
            layer.append(report)
            done += 1
            if done == total:
                self._say(f"pruned {_count(done, total, time.monotonic() - began)}  {_summary(layer)}")

        return on_operator

    def _say(self, line: str) -> None:
        self._last = time.monotonic()
        self._console.print(line, soft_wrap=True, highlight=False)


def _layer(report: "OperatorReport") -> str:
    """The name of the decoder layer: up to the first number."""
    match = re.match(r".*?\.\d+(?=\.)", report.name)
    return match[0] if match else report.name


def _summary(layer: Sequence["OperatorReport"]) -> str:
    worst = max(layer, key=lambda report: report.relative_error)
    gaps = [report.gap for report in layer if report.gap is not None]
    gap = f", gap {max(gaps):.0e}" if gaps else ""
    return f"{_layer(worst)}: error at most {worst.relative_error:.1e}{gap}"


def _count(done: int, steps: int | None, seconds: float) -> str:
    if steps is None:
        return f"{done}"
    left = timedelta(seconds=round(seconds / done * (steps - done)))
    return f"{done}/{steps}" + (f", about {left} left" if done < steps else "")
