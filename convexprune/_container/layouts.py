"""Layouts of other engines by name. To add one: a file here, and a line in `LAYOUTS`."""

from collections.abc import Callable
from pathlib import Path

from convexprune._container.compressed_tensors import export_compressed_tensors
from convexprune.errors import RecipeError, unknown

LAYOUTS: dict[str, Callable[[str | Path, str | Path, bool], Path]] = {"compressed-tensors": export_compressed_tensors}
"""Functions that write the folder of a run to another place, and return that."""


def export(
    source: str | Path, output: str | Path, format: str = "compressed-tensors", *, allow_changed: bool = False
) -> Path:
    """Write the result of a quantized run as other engines load it: codes of few bits, and scales.

    A code takes its bits, whether it is zero or not.

    Args:
        source: the folder of a run with `quantize`.
        output: where to write to; must be empty or not there. It is there whole or not at all.
        format: "compressed-tensors", a folder for vLLM and transformers.
        allow_changed: take a result whose files are not those that the run wrote.

    Returns:
        The output.

    Raises:
        RecipeError: there is no such format.
        ModelError: the folder is no result of a quantized run, or the format cannot say what it holds.
        OutputError: the output holds something, or the disk is full.
    """
    if format not in LAYOUTS:
        raise RecipeError(unknown("format", format, tuple(LAYOUTS)))
    return LAYOUTS[format](source, output, allow_changed)
