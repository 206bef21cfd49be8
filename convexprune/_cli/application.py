"""The application of all commands, its console, and a command at work: with progress, and stopped by a signal."""

import json
import shlex
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from convexprune._progress.shown import following
from convexprune._storage.staging import kept


def dashed(name: str) -> str:
    return name.replace("_", "-")


class Command(TyperCommand):
    """A command with options in groups, and help texts as wide as the terminal."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[str]] = defaultdict(list, Arguments=[], Options=[])
        for each in self.get_params(ctx):
            if record := each.get_help_record(ctx):
                unnamed = "Options" if each.param_type_name == "option" else "Arguments"
                groups[getattr(each, "rich_help_panel", None) or unnamed] += _entry(*record, formatter.width)
        for name, lines in groups.items():
            if lines:
                formatter.write("\n".join(["", f"{name}:", *lines, ""]))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        lines = (f"  convexprune {example}" for example in EXAMPLES.get(ctx.info_name, ()))
        formatter.write("\n".join(["", "Examples:", *lines, ""]))


BESIDE = 26  # characters that names of options have to the left of their text


def _entry(name: str, text: str, width: int) -> list[str]:
    head, margin = f"  {name}", " " * BESIDE
    lines = wrap(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    return [head + lines[0][len(head) :], *lines[1:]] if len(head) < BESIDE - 1 and lines else [head, *lines]


EXAMPLES = {
    "inspect": ("inspect Qwen/Qwen3-4B --pattern 2:4",),
    "advise": ("advise Qwen/Qwen3-4B --target 2GiB",),
    "prune": (
        "prune MODEL --dataset text.txt --sparsity 0.5 -o DIR",
        "prune MODEL --dataset text.txt --sparsity 0 --bits 3.3 -o DIR",
    ),
    "permute": ("permute MODEL --pattern 2:4 --dataset text.txt -o DIR",),
    "report": ("report DIR --output page.html",),
    "verify": ("verify DIR",),
    "eval": ("eval DIR --against MODEL --text held-out.txt",),
    "compare": ("compare MODEL --methods fista,sparsegpt --output DIR",),
    "pack": ("pack DIR PACK",),
    "unpack": ("unpack PACK DIR",),
    "export": ("export DIR model.gguf --format gguf",),
    "bench": ("bench DIR",),
    "doctor": ("doctor",),
    "list": ("list",),
    "recipe": ("recipe from-llmcompressor recipe.yaml",),
}
"""Commands in the order of a job, with examples."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=list(EXAMPLES).index)


class _Application(typer.Typer):
    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, **{"cls": Command, **settings})


app = _Application(
    cls=_InOrder,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, with room for it
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": dashed,
        "max_content_width": 120,
    },
)
console = Console(width=None if sys.stdout.isatty() else 160, markup=False)  # names and messages have brackets


def _version(asked: bool) -> None:
    if asked:
        print(version("convexprune"))
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it, and end.")] = False,
) -> None:
    """Prune language models by convex optimization. Begin with: convexprune prune (a small bundled model, a minute)."""


def print_json(value: Any) -> None:
    """Print JSON: a text of JSON, or an object. Numbers that are not finite become text."""
    from convexprune.report import finite

    print(value if isinstance(value, str) else json.dumps(finite(value), indent=2, allow_nan=False))


def show(table: Table) -> None:
    """Print a table at full width. In a narrow terminal lines wrap, and no number is cut."""
    table.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table, crop=False)


class Stopped(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def listening() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, unless ignored, as under nohup."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one
    heard = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def status(stop: KeyboardInterrupt) -> int:
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
