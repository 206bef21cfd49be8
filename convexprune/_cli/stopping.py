"""A command at work: with progress, and stopped by Ctrl-C or by a signal."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

from convexprune._progress.shown import following
from convexprune._storage.staging import kept


class Stopped(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def listen() -> None:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, unless ignored, as under nohup."""
    for name in ("SIGTERM", "SIGHUP"):  # the second is not on Windows
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def status(stop: KeyboardInterrupt) -> int:
    """The exit status of a process that was stopped: 128 and the signal's number."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


@contextmanager
def working(quiet: bool, output: Path | None = None, command: str = "") -> Iterator[None]:
    """Show progress, let a stopped `command` say how to go on, and hide the bars of transformers."""
    with stoppable(output, command), following(quiet=quiet):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        yield


@contextmanager
def stoppable(output: Path | None = None, command: str = "") -> Iterator[None]:
    """Inside, whoever stops the `command` is told how to go on, if its work on the `output` is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        said = "Stopped."
        if output is not None and (place := kept(output, command)) is not None:
            given = [argument for argument in sys.argv[1:] if argument != "--resume"]
            again = shlex.join(["convexprune", *given, "--resume"])
            said = f"Stopped. What is finished is kept in {place}; go on with:\n  {again}"
        Console(stderr=True, markup=False).print(said, soft_wrap=True, highlight=False)
        raise typer.Exit(status(stop)) from None
