"""The coding of a tensor's bytes, block by block: a mask of zeros, and kept entries in planes of bytes, by zstd.

A block is at most `BLOCK` bytes of a tensor, entries in order, little-endian. A block becomes a few streams, where a
stream is a length (4 bytes) and a zstd frame:

    mask    a bit for an entry, 1 if any bit of the entry is set, so -0.0 is kept
    values  plane by plane: all first bytes of the kept entries, then all second bytes, ...

Floats are rotated by one bit first, so that the sign comes last and the exponent first. The first byte of bfloat16 and
float32 is then the exponent. In its place the first plane holds a 4-bit code for the 15 most frequent exponents, and
the next 4 bits: zstd spends at least a bit on a byte, too much for exponents alone.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

BLOCK = 1 << 21  # bytes that are coded at once
FAST = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
"""Of zstd. It is to count bytes: what repeats in weights repeats by chance, and costs more to point at than to code."""
ROTATED = ("BF16", "F16", "F32", "F64")
FOLDED = ("BF16", "F32")
ESCAPE = 15  # the code of all exponents that have none of their own

Bytes = bytes | bytearray | memoryview


def width(bits: int) -> int:
    """Bytes of an entry of `bits` bits; 1 if an entry is no whole number of bytes."""
    return bits // 8 if bits % 8 == 0 else 1


def longest(nbytes: int) -> int:
    return 2 * nbytes + 1024


def encode(block: Bytes, code: str, size: int) -> bytes:
    entries = np.frombuffer(block, _unsigned(size))
    kept = np.flatnonzero(entries)
    streams = [np.packbits(entries != 0), *_split(entries.take(kept), code)]
    return compressed(streams)


def compressed(streams: Iterable[NDArray[Any]]) -> bytes:
    compress = zstandard.ZstdCompressor(compression_params=FAST).compress
    frames = (compress(stream.tobytes()) if stream.size else b"" for stream in streams)
    return b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames)


def decode(coded: Bytes, nbytes: int, code: str, size: int) -> bytes:
    streams = Streams(coded)
    count = nbytes // size
    kept = np.flatnonzero(np.unpackbits(streams.next(-(-count // 8)), count=count))
    entries = np.zeros(count, _unsigned(size))
    entries[kept] = _joined(streams, kept.size, code, size)
    streams.end()
    return entries.tobytes()


def _unsigned(size: int) -> np.dtype:
    return np.dtype(f"<u{size}")


def _split(values: NDArray[Any], code: str) -> Iterator[NDArray[Any]]:
    """The planes of kept values, the top byte first."""
    if code in ROTATED:
        values = (values << 1) | (values >> (8 * values.itemsize - 1))
    planes = list(reversed(values.view(np.uint8).reshape(values.size, values.itemsize).T))
    if code in FOLDED:
        yield from _folded(*planes[:2])
        planes = planes[2:]
    yield from planes


def _joined(streams: "Streams", count: int, code: str, size: int) -> NDArray[Any]:
    first = list(_unfolded(streams, count)) if code in FOLDED else []
    planes = first + [streams.next(count) for _ in range(size - len(first))]
    values = np.stack(planes[::-1], axis=1).reshape(-1).view(_unsigned(size))
    return (values >> 1) | (values << (8 * size - 1)) if code in ROTATED else values


def _folded(top: NDArray[Any], second: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Fold the two upper planes: exponents with a code; codes with half a byte; remaining halves; the rest."""
    frequent = np.argsort(-np.bincount(top, minlength=256), kind="stable")[:ESCAPE].astype(np.uint8)
    code_of = np.full(256, ESCAPE, np.uint8)
    code_of[frequent] = np.arange(ESCAPE, dtype=np.uint8)
    codes = code_of.take(top)
    halves = np.append(second & 15, np.zeros(second.size % 2, np.uint8))
    yield frequent
    yield (codes << 4) | (second >> 4)
    yield (halves[::2] << 4) | halves[1::2]
    yield top[codes == ESCAPE]


def _unfolded(streams: "Streams", count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    frequent, coded, pairs = streams.next(ESCAPE), streams.next(count), streams.next(-(-count // 2))
    rest = np.flatnonzero(coded >> 4 == ESCAPE)
    top = np.append(frequent, np.uint8(0)).take(coded >> 4)
    top[rest] = streams.next(rest.size)
    halves = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[:count]
    return top, (coded << 4) | halves


class Streams:
    """The streams of a coded block, in order, with known sizes after decompression."""

    def __init__(self, coded: Bytes) -> None:
        self._left = memoryview(coded)

    def next(self, nbytes: int) -> NDArray[Any]:
        length = int.from_bytes(self._left[:4], "little")
        frame, self._left = self._left[4 : 4 + length], self._left[4 + length :]
        if len(frame) != length:
            raise ValueError("a stream ends too early")
        return np.frombuffer(_decompressed(frame, nbytes) if nbytes or length else b"", np.uint8)

    def byte(self) -> int:
        if not self._left:
            raise ValueError("a block ends too early")
        value, self._left = self._left[0], self._left[1:]
        return value

    def end(self) -> None:
        if self._left:
            raise ValueError(f"{len(self._left):,} bytes more than a block has")


def _decompressed(frame: memoryview, nbytes: int) -> bytes:
    """Return the content of a zstd frame that declares `nbytes`: zstandard allocates the declared size."""
    try:
        if zstandard.frame_content_size(frame) != nbytes:
            raise ValueError(f"a stream that is not of {nbytes:,} bytes")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as cause:
        raise ValueError(str(cause)) from cause
