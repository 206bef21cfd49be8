"""The coding of quantized weights: scales, and whole numbers, several to a byte.

Scales and numbers are not passed on: `Grid.find` recovers them. A block is coded in this way only if it comes back bit
for bit. A block becomes four streams, as in `_container.format`: the upper and the lower bytes of the bfloat16 scales;
the numbers, one, two or three to a byte, whichever is smallest; and numbers too large for a digit. zstd's Huffman codes
compress the streams: bytes of several numbers come nearer to the entropy than a byte per number.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convexprune._container.format import Bytes, Streams, compressed
from convexprune._storage.tensors import DTYPES, Spec
from convexprune.constraints import GROUPS, ROW, Grid, Scales

FLOATS = ("BF16", "F16", "F32")
PROBES = 8  # groups at the beginning of a tensor that are looked at
WIDEST = 1 << 25  # bytes that are decoded at once
COLUMN = -2  # in place of a group: all of a column
KINDS = (*sorted(GROUPS, reverse=True), ROW, COLUMN, *(-size for size in GROUPS))
"""How many weights share a scale: of a row; all of it; all of a column; or of a column, as GPT-2 has its weights."""
BASES = {1: 256, 2: 16, 3: 6}  # of so many numbers to a byte: how many values each can take


class Layout(NamedTuple):
    group: int
    columns: int

    @classmethod
    def of(cls, group: int, spec: Spec) -> "Layout":
        if spec.code not in FLOATS or len(spec.shape) < 2 or group not in KINDS or not spec.nbytes:
            raise ValueError(f"a tensor of type {spec.code} and shape {list(spec.shape)} in groups of {group}")
        layout = cls(group, spec.shape[-1])
        if layout.rows * layout.row_bytes(spec) > WIDEST:
            raise ValueError(f"rows of {layout.columns:,} entries are too wide to be coded")
        return layout

    def row_bytes(self, spec: Spec) -> int:
        return self.columns * (spec.nbytes // math.prod(spec.shape))

    @property
    def transposed(self) -> bool:
        return self.group < ROW

    @property
    def rows(self) -> int:
        """Number of rows that a block must be a multiple of."""
        return -self.group if self.group < COLUMN else 1

    def grid(self) -> Grid:
        return Grid(8, ROW if self.group in (ROW, COLUMN) else abs(self.group))

    def lines(self, values: Tensor) -> Tensor:
        """Order whole rows so that entries with a common scale stand side by side: [rows columns], or transposed."""
        rows = values.view(-1, self.columns)
        return rows.T.contiguous() if self.transposed else rows

    def entries(self, lines: Tensor) -> Tensor:
        return (lines.T if self.transposed else lines).reshape(-1)


def layout_of(begin: Bytes, spec: Spec) -> Layout | None:
    """Return the layout of a quantized tensor; None if its first groups are on no grid."""
    try:
        layouts = [Layout.of(kind, spec) for kind in KINDS]
    except ValueError:
        return None
    values = _values(begin, spec.code)
    values = values[: len(values) // spec.shape[-1] * spec.shape[-1]]
    return next((layout for layout in layouts if _fits(layout, values)), None)


def _fits(layout: Layout, values: Tensor) -> bool:
    rows = len(values) // layout.columns // layout.rows * layout.rows
    lines, grid = layout.lines(values[: rows * layout.columns]), layout.grid()
    if lines.numel() == 0 or lines.shape[1] % grid.width(lines.shape[1]):
        return False
    groups = lines.reshape(-1, grid.width(lines.shape[1]))
    probes = groups[groups.any(1)][:PROBES]
    return len(probes) > 0 and not grid.violation(probes)


def encode_codes(block: Bytes, code: str, layout: Layout) -> bytes | None:
    """Code a block of quantized weights; None if the block is not on a grid, bit for bit."""
    lines = layout.lines(_values(block, code))
    if lines.shape[1] % layout.grid().width(lines.shape[1]):
        return None
    scales, codes, on = layout.grid().find(lines)
    if not bool(on.all()) or _bytes(scales, codes, code, layout) != bytes(block):
        return None
    halves = scales.bfloat16().view(torch.uint8).numpy().reshape(-1, 2)
    numbers = codes[_order(scales, layout)].numpy().reshape(-1)
    ways = (bytes([count]) + compressed(_together(numbers, count)) for count in BASES)
    return compressed((halves[:, 1], halves[:, 0])) + min(ways, key=len)


def decode_codes(coded: Bytes, nbytes: int, code: str, size: int, layout: Layout) -> bytes:
    """Decode a block; nothing larger than the block is ever in memory."""
    count = nbytes // size
    lines = (
        (layout.columns, count // layout.columns) if layout.transposed else (count // layout.columns, layout.columns)
    )
    width = layout.grid().width(lines[1])
    if count % layout.columns or lines[1] % width:
        raise ValueError(f"{count:,} entries are no whole number of groups of {width}")
    streams = Streams(coded)
    upper, lower = streams.next(count // width), streams.next(count // width)
    scales = torch.from_numpy(np.stack([lower, upper], axis=1)).view(torch.bfloat16).float().view(lines[0], -1)
    numbers = torch.from_numpy(_apart(streams, count).copy()).view(lines)
    codes = torch.empty_like(numbers)
    codes[_order(scales, layout)] = numbers
    return _bytes(scales, codes, code, layout)


def _together(numbers: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Put `count` numbers into a byte, and return the numbers without a digit separately."""
    base = BASES[count]
    if count == 1:
        return numbers.view(np.uint8), np.empty(0, np.uint8)
    most = base // 2 - 1
    large = np.abs(numbers.astype(np.int16)) > most
    digits = np.where(large, base - 1, numbers + most).astype(np.uint8)
    digits = np.append(digits, np.zeros(-digits.size % count, np.uint8)).reshape(-1, count)
    places = base ** np.arange(count, dtype=np.uint8)
    return (digits * places).sum(1, dtype=np.uint8), numbers[large].view(np.uint8)


def _apart(streams: Streams, total: int) -> NDArray[Any]:
    count = streams.byte()
    if count not in BASES:
        raise ValueError(f"{count} numbers to a byte")
    packed, base = streams.next(-(-total // count)), BASES[count]
    if count == 1:
        numbers = packed.view(np.int8)
        streams.next(0)
    else:
        places = base ** np.arange(count, dtype=np.uint8)
        digits = (packed[:, None] // places % base).reshape(-1)[:total]
        numbers = (digits.astype(np.int16) - (base // 2 - 1)).astype(np.int8)
        large = np.flatnonzero(digits == base - 1)
        numbers[large] = streams.next(large.size).view(np.int8)
    streams.end()
    return numbers


def _order(scales: Tensor, layout: Layout) -> Tensor:
    """Order columns by scale: columns with similar scales have similar numbers, and zstd makes a code per 128 KiB."""
    return scales[:, 0].argsort(stable=True) if layout.group == COLUMN else torch.arange(len(scales))


def _values(block: Bytes, code: str) -> Tensor:
    return torch.frombuffer(bytearray(block), dtype=DTYPES[code])


def _bytes(scales: Tensor, codes: Tensor, code: str, layout: Layout) -> bytes:
    """The bytes of codes times scales. No zero is negative."""
    values = layout.entries(layout.grid().weight(codes, Scales(scales)).to(DTYPES[code]))
    return values.contiguous().view(torch.uint8).numpy().tobytes()
