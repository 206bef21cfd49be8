"""One pass over a file of weights: checksum, and a check for finite values."""

import hashlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from convexprune._storage.failures import reading
from convexprune._storage.tensors import DTYPES, damaged, entries
from convexprune.errors import ModelError

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
    """Yield the next `length` bytes of a file, in a reused buffer."""
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
