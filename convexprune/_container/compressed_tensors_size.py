"""The exact size of the safetensors files of a folder for vLLM and transformers, before anything is quantized."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from convexprune._container.chosen import Size, stored_names
from convexprune._container.compressed_tensors import part_specs
from convexprune._container.folder import source_tensors
from convexprune._storage.tensors import Entry, Spec, cast, entries, header_of
from convexprune.constraints import FAMILIES, Grid
from convexprune.errors import ModelError, PatternError

GRIDS = {str(grid): grid for grid in FAMILIES["compressed-tensors"].grids if isinstance(grid, Grid)}


@dataclass(frozen=True)
class FolderSize(Size):
    """Bytes of several files, whose headers have the `fixed` bytes at most."""

    files: tuple[tuple[Mapping[str, Spec], Mapping[str, str]], ...] = ()  # tensors and metadata

    def total(self, types: Mapping[str, str]) -> int:
        chosen = {own: GRIDS[types[name]] for unit in self.units for name in unit for own in stored_names(name)}
        return sum(_bytes(specs, metadata, chosen) for specs, metadata in self.files)


def measure(source: Path, groups: Sequence[Sequence[str]], ends: Sequence[str], dtype: torch.dtype) -> FolderSize:
    """Return the size of the files of a model, whose operators will have codes; other tensors have a dtype.

    A head that is no embedding will have codes, too: transformers opens no folder with codes of an embedding.
    """
    folder, stored = source_tensors(source)
    files = tuple((_cast(found, dtype), entries(folder / path)[1]) for path, found in stored.items())
    every = {name: spec for specs, _ in files for name, spec in specs.items()}
    units = {tuple(unit): [own for name in unit for own in stored_names(name)] for unit in (*groups, ends[1:]) if unit}
    largest = dict.fromkeys(name for names in units.values() for name in names)
    if strangers := [name for name in largest if f"{name}.weight" not in every]:
        raise ModelError(
            f"{folder} stores no {strangers[0]}.weight: types can be chosen for Linear modules only. Take "
            "quantize='int4', one type for all."
        )
    sizes = {unit: _sizes([every[f"{name}.weight"] for name in names]) for unit, names in units.items()}
    most = sum(_bytes(specs, metadata, largest) for specs, metadata in files)
    fixed = most - sum(map(_bytes_of_largest, (every[f"{name}.weight"] for name in largest)))
    weights = sum(prod(spec.shape) for spec in every.values())
    return FolderSize(fixed, sizes, tuple(ends[1:]), weights, files=files)


def _cast(found: Mapping[str, Entry], dtype: torch.dtype) -> dict[str, Spec]:
    return {name: cast(entry, dtype)[0] for name, entry in found.items()}


def _bytes(specs: Mapping[str, Spec], metadata: Mapping[str, str], chosen: Mapping[str, Grid | None]) -> int:
    """Return the bytes of a file with chosen grids, or where there is none, with the longest parts of all."""
    parts = dict[str, Spec]()
    for name, spec in specs.items():
        if (own := name.removesuffix(".weight")) not in chosen:
            parts[name] = spec
            continue
        grid = chosen[own]
        parts |= {f"{name}_{p}": s for p, s in (_largest(spec) if grid is None else part_specs(spec, grid)).items()}
    return len(header_of(parts, metadata)) + sum(spec.nbytes for spec in parts.values())


def _fitting(spec: Spec) -> Iterable[tuple[str, Grid]]:
    for name, grid in GRIDS.items():
        try:
            grid.check(*spec.shape)
        except PatternError:
            continue
        yield name, grid


def _largest(spec: Spec) -> dict[str, Spec]:
    found = [part_specs(spec, grid) for _, grid in _fitting(spec)]
    return {part: max((each[part] for each in found), key=lambda s: s.nbytes) for part in found[0]}


def _bytes_of_largest(spec: Spec) -> int:
    return sum(each.nbytes for each in _largest(spec).values())


def _sizes(specs: Sequence[Spec]) -> dict[str, int]:
    """Return the bytes of operators by the types that fit all of them."""
    fits = [{name: sum(s.nbytes for s in part_specs(spec, g).values()) for name, g in _fitting(spec)} for spec in specs]
    return {name: sum(each[name] for each in fits) for name in fits[0] if all(name in each for each in fits)}
