"""The function `export`: a result in the layout of another engine, with a card of that layout."""

from dataclasses import replace
from pathlib import Path

from convexprune._container import layouts
from convexprune._progress.shown import visible
from convexprune._rendering.card import write_card
from convexprune._runs.folder import RunFolder
from convexprune._storage.files import named


@visible
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
    place = layouts.export(source, output, format, allow_changed=allow_changed)
    if place.is_dir():
        write_card(replace(RunFolder(named(source)).report(), packed=None), place, layout=format)
    return place
