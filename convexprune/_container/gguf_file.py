"""A model as a GGUF file, as llama.cpp, Ollama and LM Studio run it; and the exact size of the file beforehand."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from convexprune._container.blocks import Blocks, beside
from convexprune._container.file import is_packed
from convexprune._container.folder import source_files, source_tensors, weight_files
from convexprune._container.gguf_model import GGUFModel, write_tokenizer
from convexprune._container.layouts import Size, stored_names
from convexprune._container.provenance import holds_report, unchanged
from convexprune._progress import begin
from convexprune._runs.folder import BLOCKS, REPORT, RunFolder
from convexprune._storage.files import named, write
from convexprune._storage.staging import Staging
from convexprune._storage.tensors import Entry, cast, entries
from convexprune.constraints import FAMILIES, Q4_0, Q5_0, Q8_0, Block, Codebook, Grid, Scales, make_grid, parse_pattern
from convexprune.errors import ModelError, OutputError
from convexprune.report import Report

ROWS = 1 << 24  # weights that are compared at once
TYPES = {kind.name.lower(): kind for kind in gguf.GGMLQuantizationType}
DTYPES = {TYPES["f32"]: torch.float32, TYPES["f16"]: torch.float16, TYPES["bf16"]: torch.bfloat16}


def blocks_of(grid: Grid) -> Block:
    """Return the smallest blocks that hold all codes of a grid."""
    return next(kind() for kind in (Q4_0, Q5_0, Q8_0) if grid.bits <= kind.bits)


@dataclass(frozen=True)
class Quantized:
    """A grid, and if it is a block grid, the bytes of the weight."""

    grid: Codebook
    blocks: Blocks | None

    @property
    def type(self) -> gguf.GGMLQuantizationType:
        """The type of the tensor in the file."""
        return TYPES[str(blocks_of(self.grid) if isinstance(self.grid, Grid) else self.grid)]

    def read(self, tensor: Tensor) -> Tensor:
        """Return the bytes [m ...] of a stored weight [m n]."""
        if self.blocks is not None:
            return self.blocks.read()
        assert isinstance(self.grid, Grid)
        step, codes, _ = self.grid.find(tensor)
        blocks = blocks_of(self.grid)
        step = step.repeat_interleave(tensor.shape[1] // step.shape[1] // blocks.group, dim=1)
        return blocks.pack(codes.float(), Scales(step))


@dataclass(frozen=True)
class Part:
    """A stored tensor, and its type in the file."""

    name: str
    entry: Entry
    type: gguf.GGMLQuantizationType
    quantized: Quantized | None

    def read(self) -> Tensor:
        """Return the bytes [m ...] of the tensor in the file, its rows in their order here."""
        tensor = self.entry.read()
        if self.quantized is None:
            return tensor.to(DTYPES[self.type]).reshape(len(tensor), -1).contiguous().view(torch.uint8)
        data = self.quantized.read(tensor)
        require_same(self.name, data, self.type, tensor)
        return data


def export(source: str | Path, output: str | Path, allow_changed: bool, _: Callable[[Path], None]) -> Path:
    """Write a GGUF file: block grids as bytes, int4 and int8 as Q4_0 and Q8_0, vectors as float32, the rest as is."""
    folder, files = source_files(source)
    if any(map(is_packed, files)):
        raise ModelError(f"{folder} is a pack. Unpack it first (convexprune unpack).")
    target = named(output)
    if target.exists():
        raise OutputError(f"{target} is there already. Give another name.")
    with unchanged(folder, allow_changed):
        plain = {n: e for path in weight_files(folder, files) for n, e in entries(folder / path)[0].items()}
        if not plain:
            raise ModelError(f"{folder} holds no safetensors file. Save the model as such first.")
        model = GGUFModel.of(folder)
        report = RunFolder(folder).report() if holds_report(folder) else None
        if report is None and (folder / BLOCKS).exists():
            raise OutputError(
                f"{folder} holds {BLOCKS}, but not the {REPORT} that says of what. Put it back; or remove {BLOCKS}, to "
                "write the weights as they are stored."
            )
        quantized = {} if report is None else _quantized(model, folder, report)
        tensors = places(model, plain, quantized)
        if quantized:
            raise ModelError(f"{folder} stores no {min(quantized)[0]}, which the run has quantized.")
        chosen = report and report.sized
        metadata = (
            gguf.Metadata(**chosen["metadata"]) if chosen and chosen["metadata"] else metadata_of(folder, tensors)
        )
        with (
            Staging(target).whole(is_file=True) as path,
            closing(gguf.GGUFWriter(path, model.architecture.name)) as writer,
        ):
            describe(writer, model, folder, tensors, metadata)
            add_infos(writer, model, tensors)
            _write(writer, model, tensors)
    return target


Place = tuple[str, int | None]


def places(model: GGUFModel, plain: Mapping[str, Entry], quantized: dict[Place, Quantized]) -> dict[str, list[Part]]:
    """Return the parts of each tensor of the file: one, or all experts in their order; take the `quantized` ones."""
    places, tied = defaultdict[str, dict[int | None, Part]](dict), model.config.get("tie_word_embeddings")
    for name, entry in plain.items():
        is_copy = name == "lm_head.weight" and tied and _same(entry, plain.get("model.embed_tokens.weight"))
        if not is_copy and not name.endswith(".rotary_emb.inv_freq"):
            new, number = model.place(name)
            own = quantized.pop((new, number), None)
            kind = _type(entry, new) if own is None else own.type
            if own is not None and (columns := entry.spec.shape[-1]) % (block := gguf.GGML_QUANT_SIZES[kind][0]):
                raise ModelError(
                    f"{name.removesuffix('.weight')} is {own.grid}, with {columns} columns, and blocks of GGUF have "
                    f"{block}. Take --format compressed-tensors, or quantize again without it (--ignore)."
                )
            places[new][number] = Part(name, entry, kind, own)
    model.require({new: next(iter(parts.values())).entry.spec.shape for new, parts in places.items()})
    return {new: [parts[number] for number in sorted(parts, key=lambda n: n or 0)] for new, parts in places.items()}


def _same(head: Entry, embedding: Entry | None) -> bool:
    """Return True if a stored head is the embedding: transformers ties no head that has other values."""
    return embedding is not None and head.spec == embedding.spec and head.read_bytes() == embedding.read_bytes()


def _quantized(model: GGUFModel, folder: Path, report: Report) -> dict[Place, Quantized]:
    """Return what a run has quantized such that a file can have it, by its places in the file."""
    quantized = dict[Place, Quantized]()
    blocks = beside(folder / BLOCKS)
    grids = {operator.name: parse_pattern(operator.pattern).grid for operator in report.operators}
    tensors: Mapping[str, list[Any]] = report.sized["tensors"] if report.sized else {}
    grids |= {name: make_grid(kind) for name, kind in report.ends.items()}
    grids |= {name: make_grid(kind) for names, (kind, _) in tensors.items() for name in names.split(", ")}
    for name, grid in grids.items():
        if grid is None or "gguf" not in grid.layouts:
            continue
        for stored in (f"{own}.weight" for own in stored_names(name)):
            if not isinstance(grid, Grid) and stored not in blocks:
                in_memory = "Prune to a folder: a result in memory keeps no blocks"
                mend = "Copy or prune the model again" if blocks else in_memory
                raise ModelError(f"{folder}: {BLOCKS} has no {name}. {mend}.")
            quantized[model.place(stored)] = Quantized(grid, blocks.get(stored))
    return quantized


def _type(entry: Entry, new: str) -> gguf.GGMLQuantizationType:
    """Return the type of a tensor that is not quantized."""
    if len(entry.spec.shape) <= 1 or new.endswith("_norm.weight") or "ffn_gate_inp" in new:
        return TYPES["f32"]
    return TYPES[entry.spec.code.lower()] if entry.spec.code in ("F16", "BF16") else TYPES["f32"]


def count_weights(tensors: Mapping[str, list[Part]]) -> int:
    """Return the number of weights of all tensors."""
    return sum(torch.Size(part.entry.spec.shape).numel() for parts in tensors.values() for part in parts)


def metadata_of(folder: Path, tensors: Mapping[str, list[Part]]) -> gguf.Metadata:
    """Return what a folder's card, settings and name say of its model."""
    weights = count_weights(tensors)
    metadata = gguf.Metadata.load(None, folder, None, weights)
    metadata.size_label = metadata.size_label or gguf.size_label(weights, weights, 0, 0)
    return metadata


def describe(
    writer: gguf.GGUFWriter,
    model: GGUFModel,
    folder: Path,
    tensors: Mapping[str, list[Part]],
    metadata: gguf.Metadata,
) -> None:
    """Give a writer the keys of the file."""
    metadata.set_gguf_meta_model(writer)
    writer.add_type(gguf.GGUFType.MODEL)
    sizes = defaultdict[str, int](int)
    for part in (part for parts in tensors.values() for part in parts):
        sizes[part.type.name] += torch.Size(part.entry.spec.shape).numel()
    kind = max(sizes, key=lambda name: sizes[name])
    names = (f"MOSTLY_{kind}", f"MOSTLY_{kind}_S", "ALL_F32")
    writer.add_file_type(next(gguf.LlamaFileType[name] for name in names if name in gguf.LlamaFileType.__members__))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    model.describe(writer)
    write_tokenizer(writer, folder, int(model.config["vocab_size"]))


def stored_bytes(parts: Sequence[Part], kind: str | None = None) -> tuple[tuple[int, ...], int]:
    """Return the shape of a tensor of the file, and its bytes in a type, or in its own."""
    shape = (len(parts), *parts[0].entry.spec.shape) if len(parts) > 1 else parts[0].entry.spec.shape
    count, size = gguf.GGML_QUANT_SIZES[parts[0].type if kind is None else TYPES[kind]]
    return shape, torch.Size(shape).numel() // count * size


def add_infos(writer: gguf.GGUFWriter, model: GGUFModel, tensors: Mapping[str, list[Part]]) -> None:
    """Write what comes before the tensors."""
    for name, tensor in model.extra().items():
        writer.add_tensor_info(name, tensor.shape, tensor.numpy().dtype, tensor.nbytes)
    for name, parts in tensors.items():
        (shape, nbytes), own = stored_bytes(parts), parts[0].type
        is_blocks = gguf.GGML_QUANT_SIZES[own][0] > 1
        stored = gguf.quant_shape_to_byte_shape(shape, own) if is_blocks else shape
        kind: Any = torch.empty(0, dtype=torch.uint8 if is_blocks else torch.float32).numpy().dtype
        writer.add_tensor_info(name, stored, kind, nbytes, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


class _Rows(np.ndarray):
    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        """Let the file say why it cannot be written: numpy does not."""
        write(fid, self.data)


def _write(writer: gguf.GGUFWriter, model: GGUFModel, tensors: Mapping[str, list[Part]]) -> None:
    """Write all tensors, one after another."""
    step = begin("exporting", len(tensors))
    for tensor in model.extra().values():
        writer.write_tensor_data(tensor.numpy().view(_Rows))
    for name, parts in tensors.items():
        writer.write_tensor_data(torch.cat([model.rows(part.name, part.read()) for part in parts]).numpy().view(_Rows))
        step(name)
    writer.flush()


def require_same(name: str, data: Tensor, kind: gguf.GGMLQuantizationType, stored: Tensor) -> None:
    """Refuse bytes of a file that are not the stored weight, once they are rounded to its type."""
    rows = max(1, ROWS // stored.shape[1])
    for some, weight in zip(data.split(rows), stored.split(rows), strict=True):
        values = torch.from_numpy(gguf.quants.dequantize(some.numpy(), kind))
        if not torch.equal(values.to(stored.dtype), weight):
            raise ModelError(f"{name} has changed since it was quantized: its values are not those of {kind.name}.")


def measure(source: Path, groups: Sequence[Sequence[str]], ends: Sequence[str], dtype: torch.dtype) -> Size:
    """Return the size of the file of a model, whose operators will be on block grids; other matrices have a dtype."""
    folder, stored = source_tensors(source)
    plain = {n: replace(e, spec=cast(e, dtype)[0]) for each in stored.values() for n, e in each.items()}
    model = GGUFModel.of(folder)
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
