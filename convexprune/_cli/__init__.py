"""The command line: every command is thin over the Python function of the same name."""

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from convexprune import errors
from convexprune._cli import folders, measuring, pruning  # each file adds its commands to the application
from convexprune._cli.application import app, listening, status
from convexprune.errors import ConvexpruneError

__all__ = ["app", "folders", "main", "measuring", "pruning"]


def main() -> None:
    """Run the command line. An error that the user can mend becomes a message and exit status 2."""
    try:
        with listening(), _short_warnings():
            _run()
    except KeyboardInterrupt as stop:
        sys.exit(status(stop))
    except ConvexpruneError as error:
        name = next(known.__name__ for known in type(error).mro() if known.__name__ in vars(errors))
        message = Text.assemble((name, "bold red"), f": {error}")
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer goes nowhere
        said = f"OutputError: {error.strerror}, where this command prints or writes. Make room, or print elsewhere."
        Console(stderr=True).print(said, soft_wrap=True, highlight=False)
        sys.exit(2)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show every warning, without its place in the code, which means nothing to a user of commands."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    try:
        with warnings.catch_warnings(action="default"):
            yield
    finally:
        warnings.formatwarning = before


def _run() -> None:
    try:
        app(standalone_mode=True)
    except (MemoryError, RuntimeError) as error:
        from convexprune._device.memory import within_memory

        with within_memory():
            raise error
