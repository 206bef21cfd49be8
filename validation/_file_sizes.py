"""Bytes of the files that a model can become: GGUF and compressed-tensors, a single type or a choice for a size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from convexprune._container.layouts import LAYOUTS, imported
from convexprune.adapters import Outline, alike
from convexprune.errors import DependencyError, ModelError

Sizes = dict[str, tuple[int, int]]
"""Bytes of a whole file by the options of `prune`: the least and the most."""


def file_sizes(folder: Path, outline: Outline) -> tuple[Sizes, list[str]]:
    """Return sizes by options, and reasons for layouts that cannot say the model."""
    found, notes = Sizes(), list[str]()
    if outline.dtype == torch.float32:
        notes.append("What is not quantized is float32 in these files. With --dtype bfloat16 it has half of the bytes.")
    for layout in LAYOUTS:
        try:
            found |= dict(_sizes(folder, outline, layout))
        except (DependencyError, ModelError) as cause:
            notes.append(f"{layout}: {cause}")
    return found, notes


def _sizes(folder: Path, outline: Outline, layout: str) -> Iterator[tuple[str, tuple[int, int]]]:
    measure: Any = imported(layout).measure
    groups = alike(outline.layers)
    single, mixed = (measure(folder, groups, ends, outline.dtype) for ends in ([], outline.ends))
    if strangers := [unit[0] for unit, sizes in mixed.units.items() if not sizes]:
        raise ModelError(f"no type fits {strangers[0]}: its columns are no multiple of 32.")
    for kind in next(iter(single.units.values())):
        if all(kind in sizes for sizes in single.units.values()):
            total = single.total({name: kind for unit in single.units for name in unit})
            yield f"--quantize {_option(kind)}", (total, total)
    yield f"--quantize {layout} --target SIZE", (mixed.least, mixed.most)


def _option(kind: str) -> str:
    name, _, group = kind.partition(" in groups of ")
    row = " per output channel"
    return f"{name} --group-size {group}" if group else name.replace(row, " --group-size -1")
