"""Progress on stderr: a bar on a terminal or in a notebook; plain lines elsewhere, a line for a phase or a layer."""

import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from datetime import timedelta
from functools import wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar, cast

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from convexprune._progress import FORECAST, Event, followed_by, is_followed

P = ParamSpec("P")
R = TypeVar("R")
QUIET = 60.0  # seconds after which a line says that a long phase goes on


@contextmanager
def following(console: Console | None = None, quiet: bool = False) -> Iterator[None]:
    """Show every phase that begins, first the start of Python. A quiet command shows no warnings either."""
    if quiet:
        with _without_warnings(), followed_by(lambda _: None):
            yield
        return
    console = console or Console(stderr=True, markup=False)
    with _bar(console) if console.is_terminal else nullcontext(Lines(console)) as shown, followed_by(shown):
        shown(Event("starting"))
        yield


def visible(function: Callable[P, R]) -> Callable[P, R]:
    """Show a bar while a function runs, unless somebody follows already; its argument `on_progress` follows, too."""

    @wraps(function)
    def call(*args: P.args, **settings: P.kwargs) -> R:
        console, asked = Console(stderr=True, markup=False), cast(Any, settings.get("on_progress"))
        seen = (console.is_terminal or console.is_jupyter) and not is_followed()
        with _bar(console) if seen else nullcontext() as shown, followed_by(shown, asked):
            return function(*args, **settings)

    return call


@contextmanager
def _bar(console: Console) -> Iterator["Bar | Lines"]:
    """Yield a bar, or lines in a notebook that has no widgets."""
    if console.is_jupyter and not find_spec("ipywidgets"):
        yield Lines(console)
        return
    apart = not console.is_jupyter  # a notebook's display flushes stderr: a proxy there would display without end
    with Progress(
        *_columns(), console=console, transient=True, expand=True, redirect_stdout=apart, redirect_stderr=apart
    ) as progress:
        yield Bar(progress)


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
    return (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=words),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7, justify="right")),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        _Left(table_column=Column(no_wrap=True, min_width=12)),
    )


class _Left(ProgressColumn):
    """The time left. The column of rich looks at the last 30 seconds, and a step may take minutes."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        took = task.fields["took"]
        left, since = _left(task.fields["event"], took), (task.elapsed or took) - took
        return Text("-:--:-- left" if left is None else f"{_clock(max(0.0, left - since))} left")


def _left(event: Event, seconds: float) -> float | None:
    """Return the seconds left by the pace of a phase so far, or None before its first step."""
    made = event.done - event.earlier
    return seconds / made * (event.total - event.done) if event.total and made > 0 else None


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


class Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks = dict[str, TaskID]()

    def __call__(self, event: Event) -> None:
        if event.phase.startswith(FORECAST):
            self._progress.console.print(event.phase, soft_wrap=True, highlight=False)
            return
        if not event.done:
            self._tasks[event.phase] = self._progress.add_task(event.phase, total=event.total, event=event, took=0.0)
        shown = self._tasks[event.phase]
        words = f"{event.phase}  {event.step}" if event.step else event.phase
        took = next(task.elapsed or 0.0 for task in self._progress.tasks if task.id == shown)
        self._progress.update(shown, completed=event.done, description=words, event=event, took=took)
        for task in self._progress.task_ids:
            self._progress.update(task, visible=task == shown)


class Lines:
    """A line as a phase begins, as a layer is pruned, and now and then while a phase goes on."""

    def __init__(self, console: Console) -> None:
        self._console, self._last, self._began = console, time.monotonic(), dict[str, float]()
        self._layer = list[Any]()  # reports of the operators of a layer

    def __call__(self, event: Event) -> None:
        if not event.done:
            self._began[event.phase] = time.monotonic()
            known = f", {event.earlier}/{event.total} are finished" if event.earlier else ""
            self._say(f"{event.phase}{known}")
        elif event.done <= event.earlier:
            return
        elif event.report is not None:
            self._operator(event)
        elif time.monotonic() - self._last >= QUIET:
            self._say(f"{event.phase} {self._count(event)}  {event.step}".rstrip())

    def _operator(self, event: Event) -> None:
        if self._layer and _layer(self._layer[0]) != _layer(event.report):
            self._end_layer(replace(event, done=event.done - 1))
        self._layer.append(event.report)
        if event.done == event.total:
            self._end_layer(event)

    def _end_layer(self, event: Event) -> None:
        self._say(f"pruned {self._count(event)}  {_summary(self._layer)}")
        self._layer.clear()

    def _count(self, event: Event) -> str:
        if event.total is None:
            return f"{event.done}"
        left = _left(event, time.monotonic() - self._began[event.phase])
        said = "" if left is None or event.done == event.total else f", about {_clock(left)} left"
        return f"{event.done}/{event.total}{said}"

    def _say(self, line: str) -> None:
        self._last = time.monotonic()
        self._console.print(line, soft_wrap=True, highlight=False)


def _layer(report: Any) -> str:
    """The name of the decoder layer: up to the first number."""
    match = re.match(r".*?\.\d+(?=\.)", report.name)
    return match[0] if match else report.name


def _summary(layer: Sequence[Any]) -> str:
    worst = max(layer, key=lambda report: report.relative_error)
    gaps = [report.gap for report in layer if report.gap is not None]
    gap = f", gap {max(gaps):.0e}" if gaps else ""
    return f"{_layer(worst)}: error at most {worst.relative_error:.1e}{gap}"
