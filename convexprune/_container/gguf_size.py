"""The exact size of a GGUF file before anything is quantized, by the types of its tensors."""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import torch

from convexprune._container.chosen import Size
from convexprune._container.folder import source_tensors
from convexprune._container.gguf_file import (
    LONGEST,
    Part,
    add_infos,
    count_weights,
    describe,
    metadata_of,
    places,
    stored_bytes,
)
from convexprune._container.gguf_model import GGUFModel
from convexprune._storage.files import read_text
from convexprune._storage.tensors import cast
from convexprune.constraints import FAMILIES, Block


def measure(source: Path, groups: Sequence[Sequence[str]], ends: Sequence[str], dtype: torch.dtype) -> Size:
    """Return the size of the file of a model, whose operators will be on block grids; other matrices have a dtype."""
    folder, stored = source_tensors(source)
    plain = {n: replace(e, spec=cast(e, dtype)[0]) for each in stored.values() for n, e in each.items()}
    model = GGUFModel(json.loads(read_text(folder / "config.json", LONGEST)), folder)
    tensors, units = places(model, plain, {}), defaultdict[tuple[str, ...], list[str]](list)
    for name in (name for names in groups for name in names):
        units[tuple(sorted({place for place, _ in model.operator(name)}))].append(name)
    ends = [name for name in ends if _sizes([tensors[model.place(f"{name}.weight")[0]]])]
    units |= {(model.place(f"{name}.weight")[0],): [name] for name in ends}
    metadata, chosen = metadata_of(folder, tensors), {place for unit in units for place in unit}
    fixed = _header(model, folder, tensors, metadata) + sum(_padded(t.nbytes) for t in model.extra().values())
    fixed += sum(_padded(stored_bytes(each)[1]) for place, each in tensors.items() if place not in chosen)
    sizes = {tuple(names): _sizes([tensors[place] for place in unit]) for unit, names in units.items()}
    known = {key: value for key, value in asdict(metadata).items() if value is not None}
    return Size(fixed, sizes, tuple(ends), count_weights(tensors), known)


def _sizes(tensors: Collection[Sequence[Part]]) -> dict[str, int]:
    """Return the bytes of tensors by type, for the types that their columns fit."""
    columns = [parts[0].entry.spec.shape[-1] for parts in tensors]
    grids = [grid for grid in FAMILIES["gguf"].grids if isinstance(grid, Block)]
    fits = [grid.name for grid in grids if all(n % grid.block == 0 for n in columns)]
    return {name: sum(_padded(stored_bytes(parts, name)[1]) for parts in tensors) for name in fits}


def _header(model: GGUFModel, folder: Path, tensors: Mapping[str, list[Part]], metadata: gguf.Metadata) -> int:
    """Return the bytes before the first tensor: no type changes them."""
    with TemporaryDirectory() as place:
        writer = gguf.GGUFWriter(path := Path(place) / "header", model.architecture.name)
        describe(writer, model, folder, tensors, metadata)
        add_infos(writer, model, tensors)
        writer.close()
        return _padded(path.stat().st_size)


def _padded(size: int) -> int:
    return gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT)
