"""The exact size of a GGUF file before anything is quantized, by the types of its tensors."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch

from convexprune._container.file import SUFFIX
from convexprune._container.folder import source_files
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
from convexprune._storage.tensors import cast, entries
from convexprune.constraints import AnyBlock, Block
from convexprune.errors import ModelError, PatternError

ENDS = ("token_embd.weight", "output.weight")
"""Embedding and head, by their names in a file."""


@dataclass(frozen=True)
class Size:
    """Bytes of a file: fixed ones, and those of operators, embedding and head (`ends`) by their types."""

    fixed: int  # header, tokenizer, padding, and tensors that keep their type
    units: Mapping[tuple[str, ...], Mapping[str, int]]  # of operators that have a common type, by their names
    ends: tuple[str, ...]
    weights: int  # of all tensors
    metadata: Mapping[str, Any]  # of `gguf.Metadata`: they have a part in the bytes of the header

    def require(self, target: int) -> str:
        """Return what can be had, in words; refuse a target that no choice of types meets, or larger than all."""
        least, most = (self.fixed + sum(pick(each.values()) for each in self.units.values()) for pick in (min, max))
        told = (
            f"A file of {target:,} bytes was asked for. Accepted: {least:,} (the smallest blocks everywhere) to "
            f"{most:,} bytes (the largest), of {self.weights:,} weights. {self.fixed:,} bytes are the header, the "
            "tokenizer and tensors that are not quantized."
        )
        if not least <= target <= most:
            raise PatternError(told)
        return told

    def record(self, types: Mapping[str, str], target: int) -> dict[str, Any]:
        """Return what a report says of the file, for a choice of types by operator."""
        chosen = {unit: types[unit[0]] for unit in self.units}
        total = self.fixed + sum(self.units[unit][name] for unit, name in chosen.items())
        tensors = {", ".join(unit): [name, self.units[unit][name]] for unit, name in chosen.items()}
        bits = round(8 * total / self.weights, 4)
        return {"target": target, "bytes": total, "bits": bits, "tensors": tensors, "metadata": dict(self.metadata)}


def measure(source: Path, operators: Iterable[str], dtype: torch.dtype) -> Size:
    """Return the size of the file of a model, whose operators will be on block grids; other matrices have a dtype."""
    folder, files = source_files(source)
    stored = {n: e for path in files if path.suffix == SUFFIX for n, e in entries(folder / path)[0].items()}
    plain = {name: replace(entry, spec=cast(entry, dtype)[0]) for name, entry in stored.items()}
    if not plain:
        raise ModelError(f"{folder} holds no safetensors file. Save the model as such first.")
    model = GGUFModel(json.loads(read_text(folder / "config.json", LONGEST)), folder)
    tensors, units = places(model, plain, {}), defaultdict[tuple[str, ...], list[str]](list)
    for name in operators:
        units[tuple(sorted({place for place, _ in model.operator(name)}))].append(name)
    ends = [place for place in ENDS if place in tensors and _sizes([tensors[place]])]
    units |= {(place,): [tensors[place][0].name.removesuffix(".weight")] for place in ends}
    metadata, chosen = metadata_of(folder, tensors), {place for unit in units for place in unit}
    fixed = _header(model, folder, tensors, metadata) + sum(_padded(t.nbytes) for t in model.extra().values())
    fixed += sum(_padded(stored_bytes(each)[1]) for place, each in tensors.items() if place not in chosen)
    sizes = {tuple(names): _sizes([tensors[place] for place in unit]) for unit, names in units.items()}
    return Size(
        fixed,
        sizes,
        tuple(units[place,][0] for place in ends),
        count_weights(tensors),
        {key: value for key, value in asdict(metadata).items() if value is not None},
    )


def _sizes(tensors: Collection[Sequence[Part]]) -> dict[str, int]:
    """Return the bytes of tensors by type, for the types that their columns fit."""
    columns = [parts[0].entry.spec.shape[-1] for parts in tensors]
    fits = [g.name for g in AnyBlock().ladder() if isinstance(g, Block) and all(n % g.block == 0 for n in columns)]
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
