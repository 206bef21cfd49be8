"""Layouts of other engines by name. To add one: a file here, and a line in `LAYOUTS`."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from convexprune.errors import DependencyError, RecipeError, install_hint, unknown

LAYOUTS = {"compressed-tensors": "compressed_tensors", "gguf": "gguf_file"}
"""Modules of this package. The function `export` of a module writes a model to another place."""
SIZES = {"compressed-tensors": "compressed_tensors_size", "gguf": "gguf_size"}
"""The same. The function `measure` returns a `Size` (`_container.chosen`)."""


def export(
    source: str | Path, output: str | Path, format: str = "compressed-tensors", *, allow_changed: bool = False
) -> Path:
    """Write the result of a run as other engines load the model, without a card."""
    if format not in LAYOUTS:
        raise RecipeError(unknown("format", format, LAYOUTS))
    write: Callable[[str | Path, str | Path, bool], Path] = imported(LAYOUTS[format], format).export
    return write(source, output, allow_changed)


def imported(module: str, format: str) -> Any:
    """Return a module of this package that needs the packages of a format."""
    try:
        return import_module(f"{__package__}.{module}")
    except ImportError as cause:
        raise DependencyError(f"format={format!r} needs: {install_hint(format)}") from cause
