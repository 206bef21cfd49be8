"""The coding of quantized weights: a scale for each group, which entries are not zero, and the whole numbers of these.

Nobody tells the scales and numbers: `Grid.find` does. A block is coded so only if it comes back bit for bit. It becomes
four streams, as in `_container.format`: the upper and the lower bytes of the scales, which are bfloat16; the mask; and
the numbers that are not zero, a byte each. zstd's Huffman codes make few bits of numbers of few bits.
"""

import numpy as np
import torch
from torch import Tensor

from convexprune._container.format import Bytes, Streams, compressed
from convexprune._storage.tensors import DTYPES, Spec
from convexprune.constraints._grid import GROUPS, Grid

FLOATS = ("BF16", "F16", "F32")
PROBE = 256  # groups at the beginning of a tensor that are looked at


def group_of(begin: Bytes, spec: Spec) -> int | None:
    """How many columns share a scale, if a tensor is quantized.

    Args:
        begin: its first bytes, some whole entries.
        spec: its type and shape.

    Returns:
        The number; None if its first groups are on no grid.
    """
    if spec.code not in FLOATS or len(spec.shape) < 2:
        return None
    values = _values(begin, spec.code)
    for group in sorted(GROUPS, reverse=True):
        probe = values[: len(values) // group * group][: PROBE * group].view(-1, group)
        if spec.shape[-1] % group == 0 and bool(probe.any()) and bool(Grid(8, group).find(probe)[2].all()):
            return group
    return None


def encode_codes(block: Bytes, code: str, group: int) -> bytes | None:
    """Code a block of quantized weights.

    Args:
        block: its bytes.
        code: the type of its entries, as safetensors names it.
        group: entries that share a scale.

    Returns:
        The coded block; None if it is not on a grid, bit for bit.
    """
    values = _values(block, code)
    if len(values) % group:
        return None
    scales, codes, on = Grid(8, group).find(values.view(-1, group))
    if not bool(on.all()) or _bytes(scales, codes, code) != bytes(block):
        return None
    numbers = codes.flatten().numpy()
    halves = scales.flatten().bfloat16().view(torch.uint8).numpy().reshape(-1, 2)
    return compressed((halves[:, 1], halves[:, 0], np.packbits(numbers != 0), numbers[numbers != 0].view(np.uint8)))


def decode_codes(coded: Bytes, nbytes: int, code: str, size: int, group: int) -> bytes:
    """Decode a block; nothing larger than it is ever in memory.

    Args:
        coded: what `encode_codes` has returned.
        nbytes: the bytes of the block.
        code: the type of its entries, as safetensors names it.
        size: bytes of an entry.
        group: entries that share a scale.

    Returns:
        The block.

    Raises:
        ValueError: these are not the bytes of such a block.
    """
    count = nbytes // size
    if count % group:
        raise ValueError(f"{count:,} entries are no whole number of groups of {group}")
    streams = Streams(coded)
    upper, lower = streams.next(count // group), streams.next(count // group)
    kept = np.flatnonzero(np.unpackbits(streams.next(-(-count // 8)), count=count))
    numbers = np.zeros(count, np.int8)
    numbers[kept] = streams.next(kept.size).view(np.int8)
    streams.end()
    scales = torch.from_numpy(np.stack([lower, upper], axis=1)).view(torch.bfloat16).float()
    return _bytes(scales, torch.from_numpy(numbers).view(-1, group), code)


def _values(block: Bytes, code: str) -> Tensor:
    return torch.frombuffer(bytearray(block), dtype=DTYPES[code])


def _bytes(scales: Tensor, codes: Tensor, code: str) -> bytes:
    """The bytes of scales [groups 1] times codes [groups group]. No zero is negative."""
    values = Grid(8, codes.shape[1]).weight(codes, scales.view(-1, 1))
    return values.to(DTYPES[code]).view(torch.uint8).numpy().tobytes()
