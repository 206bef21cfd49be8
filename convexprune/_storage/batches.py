"""Batches of tensors in a file, mapped into memory singly, or on a GPU while they fit."""

from collections.abc import Iterable, Sequence
from math import prod
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import overload
from weakref import WeakSet

import torch
from torch import Tensor

from convexprune._device.capabilities import is_host
from convexprune._device.memory import release_unused
from convexprune._storage.failures import naming, writing
from convexprune._storage.files import publish, read_ahead, read_notes, sha256, write, write_notes
from convexprune._storage.tensors import CODES, DTYPES, raw

USABLE = 0.9  # of free GPU memory, which is given out in pieces that do not fit together


class Room:
    """GPU memory that a run does not need, for tensors that would go to the disk, as long as their owner lives."""

    def __init__(self, limit: int = 0) -> None:
        self._limit, self._owners = limit, WeakSet["Batches"]()

    def has(self, nbytes: int, batches: "Batches") -> bool:
        """Return True if `nbytes` more fit into the room beside those of all batches."""
        if sum(owner.held for owner in self._owners | {batches}) + nbytes >= self._limit:
            return False
        self._owners.add(batches)
        return True


def room_on(device: torch.device | str, needed: int) -> Room:
    """Return the GPU memory that a run leaves free by its formula; none on a CPU, where the system caches files."""
    device = torch.device(device)
    if is_host(device):
        return Room()
    release_unused()
    return Room(int(USABLE * torch.cuda.mem_get_info(device)[0]) - needed)


class Batches(Sequence[Tensor]):
    """Tensors of one dtype in a file, mapped into memory singly; the first stay on a GPU while it has `room`."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype | None = None,
        shapes: Iterable[Sequence[int]] = (),
        device: torch.device | str = "cpu",
        room: Room | None = None,
    ) -> None:
        self.path = path
        self.device = device
        self.dtype = dtype
        self._room, self._resident = room, list[Tensor]()
        self.shapes = [tuple(shape) for shape in shapes]
        self._ends = [0]
        for shape in self.shapes:
            self._ends.append(self._ends[-1] + _size(shape, dtype))

    @classmethod
    def kept(cls, path: Path, device: torch.device | str = "cpu") -> "Batches | None":
        """Return batches that `keep` has kept; None if missing or damaged."""
        notes = read_notes(path.with_suffix(".json"))
        if notes is None or sha256(path) != notes["sha256"]:
            return None
        return cls(path, DTYPES[notes["dtype"]], notes["shapes"], device)

    def keep(self, path: Path) -> None:
        """Move the file to where `kept` looks; notes beside it, written last, have dtype, shapes and checksum."""
        assert self.dtype is not None, "nothing was recorded"
        if self._resident and self.nbytes < sum(_size(shape, self.dtype) for shape in self.shapes):
            whole = Batches(self.path.with_suffix(".whole"))
            for batch in self:
                whole.append(batch)
            self.path, self._ends = whole.path, whole._ends
        notes = {"dtype": CODES[self.dtype], "shapes": self.shapes, "sha256": sha256(self.path)}
        with writing(path):
            publish(self.path, path)
        self.path = path
        write_notes(path.with_suffix(".json"), notes)

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        if i < len(self._resident):
            return self._resident[i]
        begin, end = self._ends[i : i + 2]
        start = begin - begin % ALLOCATIONGRANULARITY
        with naming(self.path), self.path.open("rb", buffering=0) as file:
            mapped = mmap(file.fileno(), end - start, access=ACCESS_COPY, offset=start)
        assert self.dtype is not None
        found = torch.frombuffer(mapped, dtype=self.dtype, offset=begin - start).reshape(self.shapes[i])
        if not is_host(torch.device(self.device)):
            found = found.pin_memory()  # from there the GPU copies while the host goes on
        return found.to(self.device, non_blocking=True)

    def prefetch(self) -> None:
        """Have the disk read while something else is computed."""
        read_ahead(self.path)

    @property
    def held(self) -> int:
        return sum(tensor.nbytes for tensor in self._resident)

    @property
    def nbytes(self) -> int:
        return self._ends[-1]

    def append(self, batch: Tensor) -> None:
        """Record a batch: on its device while there is room, else in the file."""
        self.dtype = self.dtype or batch.dtype
        assert batch.dtype == self.dtype
        self.shapes.append(tuple(batch.shape))
        if self._room is not None and self._room.has(batch.nbytes, self):
            self._resident.append(batch.clone(memory_format=torch.contiguous_format))  # it may be changed, or be a part
            self._ends.append(0)
            return
        self._room = None  # what comes after one that is in the file is there, too
        with writing(self.path), self.path.open("ab") as file:
            write(file, raw(batch))
        self._ends.append(self._ends[-1] + batch.nbytes)


def _size(shape: Sequence[int], dtype: torch.dtype | None) -> int:
    assert dtype is not None
    return prod(shape) * dtype.itemsize
