"""A model as a GGUF file, as llama.cpp, Ollama and LM Studio run it."""

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from convexprune._container.file import SUFFIX, is_packed
from convexprune._container.folder import source_files
from convexprune._container.gguf_model import GGUFModel
from convexprune._container.gguf_tokenizer import write_tokenizer
from convexprune._container.provenance import unchanged
from convexprune._progress import begin
from convexprune._runs.folder import BLOCKS, RunFolder
from convexprune._storage.files import named, read_text
from convexprune._storage.staging import Staging
from convexprune._storage.tensors import Entry, entries
from convexprune.constraints import Grid, parse_pattern
from convexprune.constraints._codebook import Codebook, Scales
from convexprune.constraints._ggml import Q4_0, Q8_0
from convexprune.errors import ModelError, OutputError

LONGEST = 1 << 28  # bytes of config.json
ROWS = 1 << 24  # weights that are compared at once
TYPES = {kind.name.lower(): kind for kind in gguf.GGMLQuantizationType}
DTYPES = {TYPES["f32"]: torch.float32, TYPES["f16"]: torch.float16, TYPES["bf16"]: torch.bfloat16}


@dataclass(frozen=True)
class Quantized:
    """A grid, and if it is a block grid, the bytes of an operator of which one is `number` of `count` equal parts."""

    grid: Codebook
    blocks: Entry | None
    number: int = 0
    count: int = 1

    @property
    def type(self) -> gguf.GGMLQuantizationType:
        """The type of the tensor in the file."""
        return TYPES[("q4_0" if self.grid.bits <= 4 else "q8_0") if isinstance(self.grid, Grid) else str(self.grid)]

    def read(self, tensor: Tensor) -> Tensor:
        """Return the bytes [m ...] of a stored weight [m n]."""
        if self.blocks is not None:
            return self.blocks.read().chunk(self.count)[self.number]
        assert isinstance(self.grid, Grid)
        step, codes, _ = self.grid.find(tensor)
        blocks = Q4_0() if self.grid.bits <= 4 else Q8_0()
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
        """Return the bytes [m ...] of the tensor in the file, its rows in their order here.

        Raises:
            ModelError: the stored weight is not what the blocks say.
        """
        tensor = self.entry.read()
        if self.quantized is None:
            return tensor.to(DTYPES[self.type]).reshape(len(tensor), -1).contiguous().view(torch.uint8)
        data = self.quantized.read(tensor)
        require_same(self.name, data, self.type, tensor)
        return data


def export(source: str | Path, output: str | Path, allow_changed: bool = False) -> Path:
    """Write a GGUF file of a model: pruned, smaller, quantized, or as it is.

    Operators that a run has put on block grids (`quantize`: q8_0, q6_k, ..., q2_k) are written as their bytes; int4 and
    int8 as Q4_0 and Q8_0, with the same values. All else has the type in which it is stored; vectors are float32.

    Args:
        source: the folder of a model.
        output: the file, which must not be there. It is there whole or not at all.
        allow_changed: take a result whose files are not those that the run wrote.

    Returns:
        The file.

    Raises:
        ModelError: llama.cpp has no such architecture, or the folder holds other weights than the run has quantized.
        OutputError: the file is there, or the disk is full.
    """
    folder, files = source_files(source)
    if any(map(is_packed, files)):
        raise ModelError(f"{folder} is a pack. Unpack it first (convexprune unpack).")
    target = named(output)
    if target.exists():
        raise OutputError(f"{target} is there already. Give another name.")
    with unchanged(folder, allow_changed):
        plain = {n: e for path in files if path.suffix == SUFFIX for n, e in entries(folder / path)[0].items()}
        config = json.loads(read_text(folder / "config.json", LONGEST))
        model = GGUFModel(config, folder)
        tensors = _places(model, plain, folder)
        with (
            Staging(target).whole(is_file=True) as path,
            closing(gguf.GGUFWriter(path, model.architecture.name)) as writer,
        ):
            _describe(writer, model, folder, [part for parts in tensors.values() for part in parts])
            _write(writer, model, tensors)
    return target


def _places(model: GGUFModel, plain: Mapping[str, Entry], folder: Path) -> dict[str, list[Part]]:
    """Return the parts of each tensor of the file: one, or all experts in their order."""
    quantized, places = _quantized(model, folder), defaultdict[str, dict[int | None, Part]](dict)
    for name, entry in plain.items():
        is_copy = name == "lm_head.weight" and model.config.get("tie_word_embeddings")
        if not is_copy and not name.endswith(".rotary_emb.inv_freq"):
            new, number = model.place(name)
            own = quantized.pop((new, number), None)
            kind = _type(entry, new) if own is None else own.type
            places[new][number] = Part(name, entry, kind, own)
    if quantized:
        raise ModelError(f"{folder} stores no {min(quantized)[0]}, which the run has quantized.")
    return {new: [parts[number] for number in sorted(parts, key=lambda n: n or 0)] for new, parts in places.items()}


def _quantized(model: GGUFModel, folder: Path) -> dict[tuple[str, int | None], Quantized]:
    """Return what a run has quantized such that a file can have it, by its places in the file."""
    run, quantized = RunFolder(folder), dict[tuple[str, int | None], Quantized]()
    blocks = entries(folder / BLOCKS)[0] if (folder / BLOCKS).is_file() else {}
    for report in run.report().operators if run.is_finished else ():
        grid = parse_pattern(report.pattern).grid
        if grid is None or "gguf" not in grid.layouts:
            continue
        if not isinstance(grid, Grid) and report.name not in blocks:
            raise ModelError(f"{folder}: {BLOCKS} has no {report.name}. Copy or prune the model again.")
        places = model.operator(report.name)
        for number, place in enumerate(places):
            quantized[place] = Quantized(grid, blocks.get(report.name), number, len(places))
    return quantized


def _type(entry: Entry, new: str) -> gguf.GGMLQuantizationType:
    """Return the type of a tensor that is not quantized."""
    if len(entry.spec.shape) <= 1 or new.endswith("_norm.weight") or "ffn_gate_inp" in new:
        return TYPES["f32"]
    return TYPES[entry.spec.code.lower()] if entry.spec.code in ("F16", "BF16") else TYPES["f32"]


def _describe(writer: gguf.GGUFWriter, model: GGUFModel, folder: Path, parts: list[Part]) -> None:
    """Write the keys of the file."""
    weights = sum(torch.Size(part.entry.spec.shape).numel() for part in parts)
    metadata = gguf.Metadata.load(None, folder, None, weights)
    metadata.size_label = metadata.size_label or gguf.size_label(weights, weights, 0, 0)
    metadata.set_gguf_meta_model(writer)
    writer.add_type(gguf.GGUFType.MODEL)
    sizes = defaultdict[str, int](int)
    for part in parts:
        sizes[part.type.name] += part.entry.spec.nbytes
    kind = max(sizes, key=lambda name: sizes[name])
    names = (f"MOSTLY_{kind}", f"MOSTLY_{kind}_S", "ALL_F32")
    writer.add_file_type(next(gguf.LlamaFileType[name] for name in names if name in gguf.LlamaFileType.__members__))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    model.describe(writer)
    write_tokenizer(writer, folder, int(model.config["vocab_size"]))


def _write(writer: gguf.GGUFWriter, model: GGUFModel, tensors: Mapping[str, list[Part]]) -> None:
    """Write all tensors, one after another."""
    extra = model.extra()
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tensor.shape, tensor.numpy().dtype, tensor.nbytes)
    for name, parts in tensors.items():
        shape = (len(parts), *parts[0].entry.spec.shape) if len(parts) > 1 else parts[0].entry.spec.shape
        size, count = gguf.GGML_QUANT_SIZES[parts[0].type][::-1]
        nbytes = torch.Size(shape).numel() // count * size
        stored = gguf.quant_shape_to_byte_shape(shape, parts[0].type) if count > 1 else shape
        kind: Any = torch.empty(0, dtype=torch.uint8 if count > 1 else torch.float32).numpy().dtype
        writer.add_tensor_info(name, stored, kind, nbytes, raw_dtype=parts[0].type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    step = begin("exporting", len(tensors))
    for tensor in extra.values():
        writer.write_tensor_data(tensor.numpy())
    for name, parts in tensors.items():
        writer.write_tensor_data(torch.cat([model.rows(part.name, part.read()) for part in parts]).numpy())
        step(name)
    writer.flush()


def require_same(name: str, data: Tensor, kind: gguf.GGMLQuantizationType, stored: Tensor) -> None:
    """Refuse bytes of a file that are not the stored weight, once they are rounded to its type.

    Raises:
        ModelError: the weight is another one.
    """
    rows = max(1, ROWS // stored.shape[1])
    for some, weight in zip(data.split(rows), stored.split(rows), strict=True):
        values = torch.from_numpy(gguf.quants.dequantize(some.numpy(), kind))
        if not torch.equal(values.to(stored.dtype), weight):
            raise ModelError(f"{name} has changed since it was quantized: its values are not those of {kind.name}.")
