"""Weights on block grids: a run keeps their bytes beside its weights, and a pack stores nothing else of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexprune._container.layouts import stored_names
from convexprune._runs.folder import BLOCKS
from convexprune._storage.tensors import DTYPES, Entry, Spec, entries, raw
from convexprune.constraints import FAMILIES, Block, make_grid
from convexprune.errors import DependencyError, install_hint

ROWS = 1 << 20  # weights that are decoded at once


@dataclass(frozen=True)
class Blocks:
    """The bytes of a weight: part `number` of `count` equal ones of an entry; its grid, once it is known."""

    entry: Entry
    number: int
    count: int
    grid: str = ""

    @property
    def nbytes(self) -> int:
        return self.entry.spec.nbytes // self.count

    def read(self) -> Tensor:
        """Return the bytes of the weight [m ...]."""
        return self.entry.read().chunk(self.count)[self.number]

    def decoded(self, spec: Spec) -> Iterator[bytes]:
        """Yield the bytes of the weight [m n] of a spec, as a checkpoint stores it."""
        gguf = _library()
        kind, dtype = gguf.GGMLQuantizationType[self.grid.upper()], DTYPES[spec.code]
        data = self.read()
        if len(data) != spec.shape[0]:
            raise ValueError(f"{len(data)} rows of blocks for {spec.shape[0]} of a weight")
        for rows in data.split(max(1, ROWS // spec.shape[1])):
            with np.errstate(all="ignore"):  # of other blocks, or damaged ones; what comes of it is compared
                values = gguf.quants.dequantize(rows.numpy(), kind) + 0.0  # no zero is negative
            yield bytes(raw(torch.from_numpy(values).to(dtype)))

    def of(self, weight: Entry) -> "Blocks | None":
        """Return the blocks with the grid that gives a stored weight bit for bit; None without one."""
        if len(weight.spec.shape) != 2 or weight.spec.code not in DTYPES:
            return None
        m, n = weight.spec.shape
        if self.entry.spec.shape[0] != self.count * m:  # stored transposed, as by GPT-2
            return None
        for grid in (*FAMILIES["gguf"].grids, make_grid("q4_0")):
            fits = isinstance(grid, Block) and n % grid.block == 0 and m * n * grid.bits == 8 * self.nbytes
            found = replace(self, grid=str(grid))
            if fits and b"".join(found.decoded(weight.spec)) == weight.read_bytes():
                return found
        return None


def beside(path: Path) -> dict[str, Blocks]:
    """Return the blocks in the folder of a file, by names of stored weights."""
    place, found = path.parent / BLOCKS, dict[str, Blocks]()
    for name, entry in entries(place)[0].items() if place.is_file() else ():
        stored = stored_names(name)
        found |= {f"{own}.weight": Blocks(entry, number, len(stored)) for number, own in enumerate(stored)}
    return found


def _library() -> Any:
    try:
        import gguf
    except ImportError as cause:
        raise DependencyError(f"{BLOCKS} needs: {install_hint('gguf')}") from cause
    return gguf
