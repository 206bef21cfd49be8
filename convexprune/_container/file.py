"""A safetensors file and its packed form: tensors under their names as coded bytes, or unchanged if that is shorter.

The metadata of a packed file holds the original header, the sha256 of every tensor, and the coding of coded tensors; so
the original comes back byte for byte. Everything is checked before use: the notes by a checksum, sizes against the file
and the original header, tensors by their sha256.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from convexprune._container.blocks import Blocks, beside
from convexprune._container.codes import FLOATS, Layout, decode_codes, encode_codes, layout_of
from convexprune._container.format import BLOCK, decode, encode, longest, width
from convexprune._storage import tensors
from convexprune._storage.failures import reading
from convexprune._storage.files import atomic_write, write
from convexprune._storage.tensors import BITS, LONGEST_HEADER, Entry, Spec, damaged, entries
from convexprune.errors import ModelError, shown


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


SUFFIX, PACKED = ".safetensors", ".pack.safetensors"
NOTES, CHECKSUM, VERSION = "convexprune.pack", "convexprune.pack.sha256", 2


def is_packed(path: Path) -> bool:
    return path.name.endswith(PACKED)


def packed_name(path: Path) -> Path:
    """The name of the pack of the file at `path`; that of the file itself if it is not packed."""
    return path.with_name(path.stem + PACKED) if path.suffix == SUFFIX else path


def pack_file(path: Path, target: Path) -> None:
    found, text = entries(path)[0], tensors.read_header(path).decode()
    specs, checksums, coded, groups = dict[str, Spec](), dict[str, str](), list[str](), dict[str, int]()
    grids, own = dict[str, str](), beside(path)
    # A header with these has room for that of the pack, whatever is coded.
    wider = {n: Spec(e.spec.code, (*e.spec.shape, e.spec.nbytes), e.spec.nbytes) for n, e in found.items()}
    room = len(
        _header(
            text,
            wider,
            dict.fromkeys(found, "0" * 64),
            [*found],
            dict.fromkeys(found, 999),
            dict.fromkeys(own, "iq4_nl"),
        )
    )
    if room > LONGEST_HEADER:
        raise ModelError(f"{path}: its header has {len(text):,} characters, too many to be packed.")
    with atomic_write(target) as out:
        write(out, bytes(8 + room))
        for name, entry in found.items():
            if name in own and (told := own[name].of(entry)) is not None:
                nbytes, checksums[name], group = 0, hashlib.sha256(entry.read_bytes()).hexdigest(), None
                grids[name] = told.grid
            else:
                nbytes, checksums[name], group = _write_coded(entry, out)
            specs[name] = entry.spec if nbytes is None else Spec("U8", (nbytes,), nbytes)
            coded += [] if nbytes is None else [name]
            groups |= {} if nbytes is None or group is None else {name: group}
        out.seek(0)
        write(out, room.to_bytes(8, "little") + _header(text, specs, checksums, coded, groups, grids).ljust(room))


def unpack_file(path: Path, target: Path) -> None:
    with atomic_write(target) as out:
        for data in _unpacked(path):
            write(out, data)


def packed_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    for data in _unpacked(path):
        digest.update(data)
    return digest.hexdigest()


def contents(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return the original bytes of a packed file, and by tensor the number of weights and the packed bytes."""
    header, parts = _parts(path)
    packed = {n: (p.entry.spec if p.blocks is None else p.blocks).nbytes for n, p in parts.items()}
    sized = {n: (8 * p.spec.nbytes // BITS[p.spec.code], packed[n]) for n, p in parts.items()}
    return len(header) + sum(part.spec.nbytes for part in parts.values()), sized


# ---- packing


def _write_coded(entry: Entry, out: BinaryIO) -> tuple[int | None, str, int | None]:
    """Write a tensor coded, or unchanged (None bytes) if that is not longer; also return its sha256 and its group."""
    begin, digest = out.tell(), hashlib.sha256()
    layout = layout_of(next(blocks(entry), b""), entry.spec)
    for block in blocks(entry, layout):
        digest.update(block)
        coded = _coded(block, entry.spec.code, layout)
        write(out, len(coded).to_bytes(4, "little") + coded)
    nbytes = out.tell() - begin
    if nbytes < entry.spec.nbytes:
        return nbytes, digest.hexdigest(), None if layout is None else layout.group
    out.seek(begin)
    out.truncate()
    for block in blocks(entry):
        write(out, block)
    return None, digest.hexdigest(), None


def _coded(block: bytes, code: str, layout: Layout | None) -> bytes:
    """Code a block of a tensor; the block of a quantized tensor begins with a byte that tells if the block is on the
    grid.
    """
    if layout is None:
        return encode(block, code, width(BITS[code]))
    numbers = encode_codes(block, code, layout)
    return b"\0" + encode(block, code, width(BITS[code])) if numbers is None else b"\1" + numbers


def _header(
    text: str,
    specs: Mapping[str, Spec],
    checksums: Mapping[str, str],
    coded: list[str],
    groups: Mapping[str, int],
    grids: Mapping[str, str],
) -> bytes:
    told = {"version": VERSION, "header": text, "checksums": checksums, "coded": coded, "groups": groups}
    told |= {"grids": grids} if grids else {}
    notes = json.dumps(told)
    return tensors.header_of(specs, {NOTES: notes, CHECKSUM: hashlib.sha256(notes.encode()).hexdigest()})[8:]


# ---- unpacking


class _Part(NamedTuple):
    """A tensor in a packed file: place, original spec, coding, layout of scales, and blocks in another file."""

    entry: Entry
    spec: Spec
    checksum: str
    coded: bool
    layout: Layout | None
    blocks: Blocks | None


def _unpacked(path: Path) -> Iterator[bytes]:
    """Yield the bytes of the original file by block; refuse a tensor at its end if the checksum differs."""
    header, parts = _parts(path)
    yield header
    for part in parts.values():
        digest = hashlib.sha256()
        for block in _decoded(part) if part.coded else blocks(part.entry):
            digest.update(block)
            yield block
        if digest.hexdigest() != part.checksum:
            raise damaged(path, "a tensor is not the one that was packed")


def _parts(path: Path) -> tuple[bytes, dict[str, _Part]]:
    found, metadata = entries(path)
    try:
        notes = _notes(metadata)
        text, checksums, coded = notes["header"].encode(), notes["checksums"], set(notes["coded"])
        specs, _ = tensors.parse_header(text)
        if not specs.keys() == found.keys() == checksums.keys() >= coded:
            raise ValueError("its tensors are not those that it tells of")
        layouts = {name: Layout.of(group, specs[name]) for name, group in notes["groups"].items()}
        grids, own = notes.get("grids", {}), beside(path) if "grids" in notes else {}
        told = {name: replace(own[name], grid=grid) for name, grid in grids.items()}
        parts = {
            n: _Part(found[n], spec, checksums[n], n in coded, layouts.get(n), told.get(n)) for n, spec in specs.items()
        }
        if wrong := [name for name in specs.keys() - coded if specs[name] != found[name].spec]:
            raise ValueError(f"{wrong[0]} is not what it was")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as cause:
        raise damaged(path, cause) from cause
    return len(text).to_bytes(8, "little") + text, parts


def _notes(metadata: Mapping[str, str]) -> dict[str, Any]:
    if NOTES not in metadata:
        raise ValueError("it was not packed by convexprune")
    text = metadata[NOTES]
    if hashlib.sha256(text.encode()).hexdigest() != metadata[CHECKSUM]:
        raise ValueError("its notes are not those that were written")
    notes = json.loads(text)
    if notes["version"] != VERSION:
        raise ModelError(f"It was packed in version {shown(notes['version'])} of the format. Known: {VERSION}.")
    return notes


def _decoded(part: _Part) -> Iterator[bytes]:
    code, path = part.spec.code, part.entry.path
    if part.blocks is not None:
        try:
            yield from part.blocks.decoded(part.spec)
        except (ValueError, LookupError) as cause:
            raise damaged(path, cause) from cause
        return
    with opened(part.entry) as source:
        for nbytes in sizes(part.spec, part.layout):
            length = int.from_bytes(source.read(4), "little")
            if length > longest(nbytes) + 1:
                raise damaged(path, f"{length:,} bytes for a block of {nbytes:,}")
            coded = source.read(length)
            try:
                block = _block(coded, nbytes, code, part.layout)
            except ValueError as cause:
                raise damaged(path, cause) from cause
            yield block
        if source.left:
            raise damaged(path, f"{source.left:,} bytes more than a tensor has")


def _block(coded: bytes, nbytes: int, code: str, layout: Layout | None) -> bytes:
    size = width(BITS[code])
    if layout is None:
        return decode(coded, nbytes, code, size)
    if coded[:1] not in (b"\0", b"\1"):
        raise ValueError("a block that does not say how it is coded")
    if coded[:1] == b"\1" and code in FLOATS:
        return decode_codes(memoryview(coded)[1:], nbytes, code, size, layout)
    return decode(memoryview(coded)[1:], nbytes, code, size)
