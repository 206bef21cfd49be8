"""A quantized model in the layout `pack-quantized` of compressed-tensors, which transformers and vLLM load as it is."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexprune._container.file import SUFFIX, is_packed
from convexprune._container.folder import Convert, source_files, source_tensors, write_folder
from convexprune._container.layouts import Size, stored_names
from convexprune._container.provenance import require_as_written
from convexprune._runs.folder import CARD, PAGE, REPORT, RunFolder
from convexprune._storage.files import copy_file, read_json, read_text, write_settings
from convexprune._storage.staging import Staging
from convexprune._storage.tensors import CODES, Entry, Spec, cast, entries, header_of, write_tensors
from convexprune.constraints import FAMILIES, ROW, Grid, make_grid, parse_pattern
from convexprune.errors import ModelError, PatternError

LAYOUT = "compressed-tensors"
INDEX, CONFIG = ".safetensors.index.json", "config.json"
ACCEPTED = (
    "The layout takes Linear modules only, no experts in one tensor, and none that was quantized before. "
    "`convexprune pack` takes any model."
)
OF_RUN = (CARD, REPORT, PAGE)  # tell of the files as they were
EXPERTS = r"re:.*\.experts\.\d+\.\w+"
LONGEST = 1 << 28  # bytes of an index; that of 1,000,000 tensors has less


def export(source: str | Path, output_dir: str | Path, allow_changed: bool, add_card: Callable[[Path], None]) -> Path:
    """Write a folder of codes and scales, for transformers (with the package compressed-tensors) and vLLM.

    They compute with the weights that the run has stored, bit for bit.
    """
    staging = Staging.of_new(output_dir, source)
    folder, files = source_files(source)
    if any(map(is_packed, files)):
        raise ModelError(f"{folder} is a pack. Unpack it first (convexprune unpack).")
    grids = _grids(folder)
    require_as_written(folder, allow_changed)
    _require_settings(folder, files)
    tensors = [path for path in files if path.suffix == SUFFIX]
    plain = {name: entry for path in tensors for name, entry in entries(folder / path)[0].items()}
    weights = {name: entry for name, entry in plain.items() if name.endswith(".weight") and len(entry.spec.shape) == 2}
    report = RunFolder(folder).report()
    kept = {f"{name}.weight" for name in report.ends.keys() - grids.keys()}
    found = {name: _grid_of(name, entry, grids) for name, entry in weights.items() if name not in kept}
    quantized = {name: grid for name, grid in found.items() if grid is not None}
    _refuse_stacked(folder, [name for name, entry in plain.items() if len(entry.spec.shape) == 3], report.left_alone)
    asked = sum(operator.outputs * operator.inputs for operator in report.operators)
    heads = grids.keys() - {own for operator in report.operators for own in stored_names(operator.name)}
    asked += sum(prod(weights[f"{name}.weight"].spec.shape) for name in heads)
    if (count := sum(prod(weights[name].spec.shape) for name in quantized)) != asked:
        raise ModelError(
            f"{folder}: the run has quantized {asked:,} weights, and matrices [outputs inputs] with {count:,} are on "
            f"{', '.join(sorted(map(str, set(grids.values()))))}. {ACCEPTED}"
        )
    # Names on disk may be older than those of the modules, and engines go by one or the other.
    left = {name.removesuffix(".weight") for name in weights.keys() - quantized.keys()} | {*report.left_alone}
    left |= {"lm_head"} - grids.keys()
    converts: dict[Path, Convert] = {path: partial(_convert_tensors, quantized=quantized) for path in tensors}
    converts |= {path: partial(_convert_index, quantized=quantized) for path in files if path.name.endswith(INDEX)}
    converts[Path(CONFIG)] = partial(_convert_config, quantized=quantized, left=sorted(left))
    kept = sorted(set(files) - {Path(name) for name in OF_RUN}, key=lambda path: (path not in tensors, path))
    writes = {path: (path, converts.get(path, copy_file)) for path in kept}
    return write_folder("exporting", folder, files, writes, staging, add_card)


def _require_settings(folder: Path, files: Iterable[Path]) -> None:
    """Refuse, before any work, a model without settings, and settings or an index that are not of a model."""
    if Path(CONFIG) not in files:
        raise ModelError(f"{folder} has no {CONFIG}, without which nothing loads it. Put it back.")
    known = {path.as_posix() for path in files}
    for path in files:
        if path.name.endswith(INDEX) or path == Path(CONFIG):
            value = read_json(folder / path) if (folder / path).stat().st_size <= LONGEST else None
            places = value.get("weight_map") if isinstance(value, dict) and path != Path(CONFIG) else {}
            names = places.values() if isinstance(value, dict) and isinstance(places, dict) else [None]
            if not {(path.parent / name).as_posix() if isinstance(name, str) else "" for name in names} <= known:
                raise ModelError(f"{folder / path} is damaged: save_pretrained writes something else. Put it back.")


def _refuse_stacked(folder: Path, names: Iterable[str], left_alone: Iterable[str]) -> None:
    """Refuse experts in one tensor that the run has left as they are: engines put quantized modules in their place."""
    ends = {tuple(name.split(".")[-2:]) for name in left_alone if not name.endswith(".weight")}
    if stacked := [name for name in names if tuple(name.split(".")[-2:]) in ends]:
        raise ModelError(f"{folder}: {stacked[0]} has 3 dimensions. {ACCEPTED}")


def require_matrices(source: Path, operators: int, ends: Iterable[str], left_alone: Iterable[str]) -> None:
    """Refuse, before a run, a model that stores its operators, of so many weights, otherwise than `export` takes."""
    every = {name: entry.spec.shape for found in source_tensors(source)[1].values() for name, entry in found.items()}
    _refuse_stacked(source, [name for name, shape in every.items() if len(shape) == 3], left_alone)
    outside = {f"{name}.weight" for name in ends}
    matrices = {name: prod(s) for name, s in every.items() if name.endswith(".weight") and len(s) == 2}
    if sum(count for name, count in matrices.items() if name not in outside) < operators:
        raise ModelError(f"{source} stores operators that are no matrices. {ACCEPTED}")


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes [m n], the lowest bit first, into whole words for each row: int32 [m ceil(n bits / 32)]."""
    positive = (codes.to(torch.int16) + 2 ** (bits - 1)).numpy().astype(np.uint8)
    rows = np.unpackbits(positive[..., None], axis=2, count=bits, bitorder="little").reshape(len(positive), -1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32)))
    return torch.from_numpy(np.packbits(rows, axis=1, bitorder="little").view("<i4"))


def _grids(folder: Path) -> dict[str, Grid]:
    """Return the grids of the run whose result a folder is, by operator; the head may have one, too."""
    if not RunFolder(folder).is_finished:
        raise ModelError(f"{folder} is no result of a run. Give the folder that `prune --quantize int4` has written.")
    report = RunFolder(folder).report()
    tensors: dict[str, list[Any]] = report.sized["tensors"] if report.sized else {}
    grids: dict[str, Any] = {
        name: make_grid(kind) for names, (kind, _) in tensors.items() for name in names.split(", ")
    }
    grids |= {name: make_grid(kind) for name, kind in [*report.ends.items()][1:]}  # transformers takes no embedding
    grids |= {operator.name: parse_pattern(operator.pattern).grid for operator in report.operators}
    if others := [grid for grid in grids.values() if grid is not None and LAYOUT not in grid.layouts]:
        raise ModelError(
            f"{folder} has {others[0]}, which the layout pack-quantized cannot say. Prune with --quantize int4, say, "
            "or take `convexprune pack`."
        )
    if not grids or None in grids.values():
        raise ModelError(f"{folder} is not quantized. Prune with --quantize int4, say.")
    return {own: grid for name, grid in grids.items() for own in stored_names(name)}


def _grid_of(name: str, entry: Entry, grids: Mapping[str, Grid]) -> Grid | None:
    """Return the grid that a stored weight is on: its own, or one of all if the operator has another name here."""
    own, columns = grids.get(name.removesuffix(".weight")), entry.spec.shape[1]
    for grid in dict.fromkeys(grids.values()) if own is None else [own]:
        fits = entry.spec.code in CODES.values() and columns % grid.width(columns) == 0
        if fits and bool(grid.find(entry.read())[2].all()):
            return grid
    return None


def part_specs(spec: Spec, grid: Grid) -> dict[str, Spec]:
    """Return the tensors in place of a weight [m n] of a spec."""
    rows, columns = spec.shape
    words, groups = -(-columns * grid.bits // 32), columns // grid.width(columns)
    size = spec.nbytes // (rows * columns)
    return {
        "packed": Spec("I32", (rows, words), 4 * rows * words),
        "scale": Spec(spec.code, (rows, groups), size * rows * groups),
        "shape": Spec("I64", (2,), 16),
    }


def _convert_tensors(path: Path, target: Path, quantized: Mapping[str, Grid]) -> None:
    """Write a file of tensors with codes, scales and a shape in place of each quantized weight."""
    found, metadata = entries(path)
    parts = lru_cache(1)(lambda name: _parts(found[name], quantized[name]))  # looked for once
    specs = dict[str, Spec]()
    makes = dict[str, Callable[[], Tensor | bytearray]]()
    for name, entry in found.items():
        if name not in quantized:
            specs[name], makes[name] = entry.spec, entry.read_bytes
            continue
        for part, spec in part_specs(entry.spec, quantized[name]).items():
            specs[f"{name}_{part}"] = spec
            makes[f"{name}_{part}"] = lambda name=name, part=part: parts(name)[part]
    write_tensors(target, specs, lambda name: makes[name](), metadata)


def _parts(entry: Entry, grid: Grid) -> dict[str, Tensor]:
    weight = entry.read()
    scales, codes, _ = grid.find(weight)
    shape = torch.tensor(weight.shape)
    return {"packed": packed_codes(codes, grid.bits), "scale": scales.to(weight.dtype), "shape": shape}


def _convert_index(path: Path, target: Path, quantized: Mapping[str, Grid]) -> None:
    index = json.loads(read_text(path, LONGEST))
    places = {name: str(place) for name, place in index["weight_map"].items()}
    for name in quantized.keys() & places.keys():
        places |= dict.fromkeys([f"{name}_{part}" for part in ("packed", "scale", "shape")], places.pop(name))
    found = [entries(target.parent / place)[0] for place in sorted(set(places.values()))]
    size = sum(entry.spec.nbytes for each in found for entry in each.values())
    write_settings(target, index | {"metadata": {"total_size": size}, "weight_map": places})


def _config_group(grid: Grid, targets: list[str]) -> dict[str, Any]:
    shared = {"strategy": "channel"} if grid.group == ROW else {"strategy": "group", "group_size": grid.group}
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": True} | shared | {"dynamic": False}
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _convert_config(path: Path, target: Path, quantized: Mapping[str, Grid], left: list[str]) -> None:
    names = defaultdict[tuple[Grid, bool], set[str]](set)  # transformers knows the group of experts by an expression
    for name, grid in quantized.items():
        is_expert = ".experts." in name
        names[grid, is_expert].add(EXPERTS if is_expert else name.removesuffix(".weight"))
    groups = [_config_group(grid, sorted(own)) for (grid, _), own in names.items()]
    if len(kinds := set(quantized.values())) == 1:
        groups = [_config_group(kinds.pop(), ["Linear"])]
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": left,
    }
    config = json.loads(read_text(path, LONGEST))
    config.pop("sparsity_config", None)
    write_settings(target, config | {"quantization_config": quantization})


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
    specs = {path: {n: cast(entry, dtype)[0] for n, entry in found.items()} for path, found in stored.items()}
    files = tuple((found, entries(folder / path)[1]) for path, found in specs.items())
    every = {name: spec for found in specs.values() for name, spec in found.items()}
    units = {tuple(unit): [own for name in unit for own in stored_names(name)] for unit in (*groups, ends[1:]) if unit}
    largest = dict.fromkeys(name for names in units.values() for name in names)
    if strangers := [name for name in largest if f"{name}.weight" not in every]:
        raise ModelError(
            f"{folder} stores no {strangers[0]}.weight: types can be chosen for Linear modules only. Take "
            "quantize='int4', one type for all."
        )
    sizes = {unit: _sizes([every[f"{name}.weight"] for name in names]) for unit, names in units.items()}
    most = sum(_bytes(found, metadata, largest) for found, metadata in files)
    fixed = most - sum(part.nbytes for name in largest for part in _largest(every[f"{name}.weight"]).values())
    weights = sum(prod(spec.shape) for spec in every.values())
    return FolderSize(fixed, sizes, tuple(ends[1:]), weights, files=files)


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


def _sizes(specs: Sequence[Spec]) -> dict[str, int]:
    """Return the bytes of operators by the types that fit all of them."""
    fits = [{name: sum(s.nbytes for s in part_specs(spec, g).values()) for name, g in _fitting(spec)} for spec in specs]
    return {name: sum(each[name] for each in fits) for name in fits[0] if all(name in each for each in fits)}
