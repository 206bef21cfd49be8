"""A tensor in a file, in blocks that are coded singly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from convexprune._container.codes import Layout
from convexprune._container.format import BLOCK
from convexprune._storage.failures import reading
from convexprune._storage.tensors import Entry, Spec, damaged


def blocks(entry: Entry, layout: Layout | None = None) -> Iterator[bytes]:
    """The bytes of a tensor that is not coded, a block at a time."""
    with opened(entry) as source:
        for nbytes in sizes(entry.spec, layout):
            yield source.read(nbytes)


def sizes(spec: Spec, layout: Layout | None = None) -> Iterator[int]:
    """Yield the sizes of a tensor's blocks in bytes. With a layout a block is whole rows of a matrix."""
    whole, most = spec.nbytes, BLOCK
    if layout is not None:
        row = layout.row_bytes(spec)
        whole, most = row * spec.shape[-2], max(1, BLOCK // (row * layout.rows)) * row * layout.rows
    for _ in range(spec.nbytes // whole if whole else 0):
        yield from (min(most, whole - begin) for begin in range(0, whole, most))


@contextmanager
def opened(entry: Entry) -> Iterator["Source"]:
    with reading(entry.path), entry.path.open("rb") as file:
        file.seek(entry.begin)
        yield Source(file, entry)


class Source:
    """The bytes of a tensor in a file, `left` of which are unread.

    Args:
        file: open, at the tensor's first byte.
    """

    def __init__(self, file: BinaryIO, entry: Entry) -> None:
        self._file, self._path, self.left = file, entry.path, entry.spec.nbytes

    def read(self, nbytes: int) -> bytes:
        data = self._file.read(min(nbytes, self.left))
        self.left -= len(data)
        if len(data) != nbytes:
            raise damaged(self._path)
        return data
