"""Safetensors files, read and written a tensor at a time."""

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from convexprune._storage.failures import reading
from convexprune._storage.files import Stamp, atomic_write, read_ahead, write
from convexprune.errors import ModelError

# The codes of the safetensors format for the types that a language model is stored in.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Those of all types that the format has; what cannot be a weight is copied as it is.
BITS = {code: 8 * dtype.itemsize for code, dtype in DTYPES.items()} | {
    "U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes; that of the library


class Spec(NamedTuple):
    code: str  # of the type
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        return cls(CODES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


@dataclass(frozen=True)
class Entry:
    path: Path
    spec: Spec
    begin: int  # offset of the first byte in the file

    def read(self) -> Tensor:
        if self.spec.code not in DTYPES:
            raise ModelError(f"{self.path}: a tensor of type {self.spec.code}; known: {', '.join(DTYPES)}.")
        dtype, data = DTYPES[self.spec.code], self.read_bytes()
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(self.spec.shape)

    def prefetch(self) -> None:
        read_ahead(self.path, self.begin, self.spec.nbytes)

    def read_bytes(self) -> bytearray:
        data = bytearray(self.spec.nbytes)
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            view = memoryview(data)
            while view and (count := file.readinto(view)):  # the system reads 2 GiB at most at once
                view = view[count:]
        if view:
            raise damaged(self.path)
        return data


@dataclass(frozen=True)
class ChangedEntry(Entry):
    """A tensor that is computed from a tensor in a file."""

    whole: Entry
    change: Callable[[Tensor], Tensor]

    def read(self) -> Tensor:
        return self.change(self.whole.read())

    def read_bytes(self) -> bytearray:
        return bytearray(raw(self.read()))


def entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return tensors and metadata by the header of a safetensors file; what the library refuses is refused here."""
    size, text = Stamp.of(path).size, read_header(path)
    try:
        specs, metadata = parse_header(text)
        start = 8 + len(text)
        if size != (told := start + sum(spec.nbytes for spec in specs.values())):
            raise ValueError(f"{size:,} bytes, its header tells of {told:,}")
    except ValueError as cause:
        raise damaged(path, cause) from cause
    tensors = {}
    for name, spec in specs.items():
        tensors[name] = Entry(path, spec, start)
        start += spec.nbytes
    return tensors, metadata


def read_header(path: Path) -> bytes:
    """Return the header of a safetensors file, unparsed; empty if the file is shorter than declared."""
    size = Stamp.of(path).size
    with reading(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(length) if 8 + length <= min(size, LONGEST_HEADER) else b""


def parse_header(text: bytes) -> tuple[dict[str, Spec], dict[str, str]]:
    """Return the tensors of a safetensors header in the order of their bytes, and the metadata."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once, parse_int=_count)
        metadata = header.pop("__metadata__", {})
        specs, last = {}, 0
        for begin, end, name in sorted((*value["data_offsets"], name) for name, value in header.items()):
            if begin != last:
                raise ValueError(f"{name} begins at byte {begin:,}, what is before it ends at {last:,}")
            specs[name] = _spec(name, header[name], end - begin)
            last = end
        "".join((*specs, *metadata, *metadata.values())).encode()  # all are text, without halves of characters
    except (KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise ValueError(str(cause)) from cause
    return specs, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name that comes twice")
    return members


def _count(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 19:
        raise ValueError(f"{digits[:30]} is no number of bytes")
    return int(digits)


def _spec(name: str, value: dict[str, Any], nbytes: int) -> Spec:
    code, shape = value["dtype"], value["shape"]
    if value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has {', '.join(value)}")
    if not isinstance(shape, list) or not all(type(count) is int for count in (*shape, *value["data_offsets"])):
        raise ValueError(f"{name} has a size that is no whole number")
    if 8 * nbytes != prod(shape) * BITS[code] or prod(max(1, count) for count in shape) * BITS[code] >= 1 << 64:
        raise ValueError(f"{name}: {nbytes:,} bytes for {code} {shape}")
    return Spec(code, tuple(shape), nbytes)


def header_of(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a file before its first tensor."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        header[name] = {"dtype": spec.code, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are to be aligned
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path, specs: Mapping[str, Spec], read: Callable[[str], Tensor | bytearray], metadata: Mapping[str, str]
) -> None:
    with atomic_write(path) as file:
        write(file, header_of(specs, metadata))
        for name in specs:
            value = read(name)
            write(file, raw(value) if isinstance(value, Tensor) else value)


def raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def damaged(path: Path, cause: object = "it ends too early") -> ModelError:
    return ModelError(f"{path}: damaged or cut short ({cause}). Copy or download it again.")


def cast(entry: Entry, dtype: torch.dtype) -> tuple[Spec, Callable[[], Tensor | bytearray]]:
    """Return the spec of a tensor in a new dtype, and a function that reads and converts the tensor."""
    stored = DTYPES.get(entry.spec.code)
    if stored is None or not stored.is_floating_point or stored == dtype:
        return entry.spec, entry.read_bytes
    elements = entry.spec.nbytes // stored.itemsize
    return Spec(CODES[dtype], entry.spec.shape, elements * dtype.itemsize), lambda: entry.read().to(dtype)


CHUNK = 1 << 24  # bytes, whole numbers of any type


def scanned(path: Path, weights: Container[str]) -> str:
    """Return the sha256 of a safetensors file, never whole in memory, and check tensors on the way."""
    found, digest = entries(path)[0], hashlib.sha256()
    start = min((entry.begin for entry in found.values()), default=path.stat().st_size)
    with reading(path), path.open("rb") as file:
        for chunk in _chunks(path, file, start):
            digest.update(chunk)
        for name, entry in found.items():
            dtype = DTYPES.get(entry.spec.code, torch.uint8)
            looked_at, broken = name in weights and dtype.is_floating_point, 0
            for chunk in _chunks(path, file, entry.spec.nbytes):
                digest.update(chunk)
                if looked_at:
                    broken += _broken(torch.frombuffer(chunk, dtype=dtype))
            if broken:
                raise not_finite(name, broken, entry.spec.nbytes // dtype.itemsize)
    return digest.hexdigest()


def not_finite(name: str, broken: int, count: int) -> ModelError:
    return ModelError(
        f"{name} holds {broken:,} of {count:,} values that are NaN or infinite. Repair or download the checkpoint "
        "again; float16 checkpoints may overflow, bfloat16 ones do not."
    )


def _chunks(path: Path, file: BinaryIO, length: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(length, CHUNK)))
    for begin in range(0, length, CHUNK):
        part = buffer[: length - begin]
        if file.readinto(part) != len(part):  # pyright: ignore[reportAttributeAccessIssue]
            raise damaged(path)
        yield part


def _broken(values: torch.Tensor) -> int:
    if all(extreme.isfinite() for extreme in values.aminmax()):  # NaN is both
        return 0
    return values.numel() - int(values.isfinite().sum())
