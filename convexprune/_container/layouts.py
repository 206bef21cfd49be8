"""Layouts of other engines by name. To add one: a file here, and a line in `LAYOUTS`."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from convexprune.errors import DependencyError, RecipeError, install_hint, unknown

LAYOUTS = {"compressed-tensors": "compressed_tensors", "gguf": "gguf_file"}
"""Modules of this package. The function `export` of a module writes a model to another place."""


def export(
    source: str | Path, output: str | Path, format: str = "compressed-tensors", *, allow_changed: bool = False
) -> Path:
    """Write the result of a run as other engines load it.

    Args:
        source: the folder of a run. For GGUF any folder of a model will do; what is not quantized keeps its type.
        output: where to write to; must be empty or not there. It is there whole or not at all.
        format: "compressed-tensors", a folder for vLLM and transformers, of a run with `quantize` int8 to int3. "gguf",
            a file for llama.cpp, Ollama and LM Studio.
        allow_changed: take a result whose files are not those that the run wrote.

    Returns:
        The output.

    Raises:
        RecipeError: there is no such format.
        DependencyError: the format needs a package that is not there.
        ModelError: the format cannot say what the folder holds.
        OutputError: the output holds something, or the disk is full.
    """
    if format not in LAYOUTS:
        raise RecipeError(unknown("format", format, LAYOUTS))
    try:
        write: Callable[[str | Path, str | Path, bool], Path] = import_module(f"{__package__}.{LAYOUTS[format]}").export
    except ImportError as cause:
        raise DependencyError(f"format={format!r} needs: {install_hint(format)}") from cause
    return write(source, output, allow_changed)
