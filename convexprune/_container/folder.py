"""A model folder and its pack: equal file names, tensors packed, all further files copied."""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from convexprune._container.file import (
    PACKED,
    SUFFIX,
    contents,
    is_packed,
    pack_file,
    packed_checksum,
    packed_name,
    unpack_file,
)
from convexprune._container.provenance import require_as_written
from convexprune._progress import begin
from convexprune._progress.shown import visible
from convexprune._runs.folder import BLOCKS, REPORT, RunFolder
from convexprune._storage.checkpoint import checkpoint_files
from convexprune._storage.failures import reading
from convexprune._storage.files import (
    PARTS,
    Stamp,
    copy_file,
    named,
    paths_in,
    refuse_foreign,
    require_unchanged,
)
from convexprune._storage.staging import Staging
from convexprune._storage.tensors import Entry, entries
from convexprune.errors import ConvexpruneError, ModelError, OutputError
from convexprune.report import Report

Convert = Callable[[Path, Path], None]
"""Writes what is made of the file at a path to another one."""

logger = logging.getLogger(__name__)
ROOM, RATIO = 64 << 20, 400  # bytes; a pack of more per packed byte holds nearly nothing but zeros
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")


@dataclass(frozen=True)
class Packed:
    """The result of packing. An unpacked model takes its former memory and time.

    Args:
        output_dir: folder of the pack.
        before: bytes of all files before packing.
        after: bytes of all files of the pack.
        bits: bits per weight in the packed files.
        operator_bits: bits per weight of the operators in the report; None without a report.
    """

    output_dir: Path
    before: int
    after: int
    bits: float
    operator_bits: float | None = None

    @property
    def bits_text(self) -> str:
        """Bits a weight of the operators, if they are known, and of all that is packed."""
        own = "" if self.operator_bits is None else f"{self.operator_bits:.2f} of the operators, "
        return f"bits a weight: {own}{self.bits:.2f} of all"

    def tell(self, report: Report) -> None:
        """Put the sizes into a report.

        Args:
            report: Report of the pruned folder; `packed` and `bytes` of it are set.
        """
        report.packed = {"before": self.before, "after": self.after, "bits": self.bits}
        report.packed |= {} if self.operator_bits is None else {"operator_bits": self.operator_bits}
        report.bytes = self.after


def measured(folder: Path, names: Iterable[Path], operators: Iterable[str] = ()) -> Packed:
    """Read the sizes of a pack from the headers of its files. The `operators` are those that were pruned."""
    files = [folder / name for name in names]
    packs = {path: contents(path) for path in files if is_packed(path)}
    sizes = {path: Stamp.of(path).size for path in files}
    before = sum(packs[path][0] if path in packs else size for path, size in sizes.items())
    tensors = {name: size for _, inside in packs.values() for name, size in inside.items()}
    stored = [path for path in files if path in packs or path.name == BLOCKS]
    bits = 8 * sum(sizes[path] for path in stored) / max(1, sum(count for count, _ in tensors.values()))
    pruned = [tensors[f"{name}.weight"] for name in operators if f"{name}.weight" in tensors]
    own = 8 * sum(size for _, size in pruned) / sum(count for count, _ in pruned) if pruned else None
    return Packed(folder, before, sum(sizes.values()), bits, own)


@visible
def pack(source: str | Path, output_dir: str | Path, *, allow_changed: bool = False) -> Packed:
    """Write a model folder as a smaller one, from which `unpack` makes the same files again, byte for byte.

    Any safetensors checkpoint can be packed, zeros make it small (docs/pack.md). It takes a few MB of memory.

    Args:
        source: a folder that holds safetensors files, such as `prune` writes.
        output_dir: where to write the pack; must be empty or not there. It is there whole or not at all.
        allow_changed: take a result whose files are not those that its run wrote.

    Returns:
        The folder, and sizes before and after.

    Raises:
        ModelError: a file of the model is damaged, cannot be read, or is a link that leads elsewhere; there are no
            safetensors; or it is a pack already.
        OutputError: the output folder holds something, the source is the result of a run and is not what the run
            wrote, or the disk is full.
    """
    staging = Staging.of_new(output_dir, source)
    folder, files = source_files(source)
    if any(map(is_packed, files)):
        raise ModelError(f"{folder} is a pack already. Give a folder of plain safetensors files.")
    weight_files(folder, files)  # refuses a folder that lacks a shard
    if not any(path.suffix == SUFFIX for path in files):
        raise ModelError(f"{folder} holds no safetensors file: there is nothing to pack. Save the model as such first.")
    if left_out := [path for path in files if path.name.endswith(OTHER_WEIGHTS)]:
        logger.warning("left out, weights in another format: %s", ", ".join(map(str, left_out)))
    writes = {
        path: (packed_name(path), pack_file if path.suffix == SUFFIX else copy_file)
        for path in files
        if path not in left_out
    }
    require_as_written(folder, allow_changed)
    target = write_folder("packing", folder, files, writes, staging)
    return measured(target, (name for name, _ in writes.values()), _operators(folder))


def _operators(folder: Path) -> list[str]:
    try:
        return [o.name for o in RunFolder(folder).report().operators] if (folder / REPORT).is_file() else []
    except ConvexpruneError:
        return []


@visible
def unpack(
    source: str | Path, output_dir: str | Path, *, allow_changed: bool = False, allow_large: bool = False
) -> Path:
    """Write the files of a pack, byte for byte as they were before they were packed.

    Args:
        source: the folder of a pack.
        output_dir: where to write the model; must be empty or not there. It is there whole or not at all.
        allow_changed: take a result whose files are not those that its run wrote.
        allow_large: write more than 400 times the bytes of the pack and 64 MiB.

    Returns:
        The folder of the model.

    Raises:
        ModelError: the folder is no pack, or one of its files is damaged, cannot be read, or leads elsewhere; or the
            model is too large for the pack.
        OutputError: the output folder holds something, or the disk has not enough room.
    """
    staging = Staging.of_new(output_dir, source)
    folder, files = source_files(source)
    if not any(map(is_packed, files)):
        raise ModelError(f"{folder} is no pack: it holds no file whose name ends in {PACKED}.")
    names = {
        path: path.with_name(path.name.removesuffix(PACKED) + SUFFIX) if is_packed(path) else path for path in files
    }
    if len(set(names.values())) < len(names):
        raise ModelError(f"{folder} holds a file and its pack as well. Remove the one that is not to be read.")
    sizes = measured(folder, files)
    if sizes.before > ROOM + RATIO * sizes.after and not allow_large:
        raise ModelError(
            f"{folder} has {sizes.after:,} bytes and unpacks to {sizes.before:,}, nearly all zero. Accepted: {RATIO} "
            f"times as many, and {ROOM:,} more. Take it as it is with allow_large=True (--allow-large)."
        )
    there = next(path for path in staging.output.absolute().parents if path.exists())
    if sizes.before > (free := shutil.disk_usage(there).free):
        raise OutputError(
            f"{staging.output}: {sizes.before:,} bytes are needed, and {free:,} are free. Make room, or give another "
            "folder."
        )
    writes = {path: (name, copy_file if name == path else unpack_file) for path, name in names.items()}
    require = partial(require_as_written, allow_changed=allow_changed)
    return write_folder("unpacking", folder, files, writes, staging, require)


def pack_in_place(folder: Path, checksums: Mapping[str, str], operators: Iterable[str]) -> Packed:
    """Replace a result's safetensors files by packs that unpack to the same; each is always there, plain or packed."""
    for path in (folder / name for name in checksums):
        if path.suffix == SUFFIX:
            begin(f"packing {path.name}")
            packed = packed_name(path)
            pack_file(path, packed)
            if packed_checksum(packed) != checksums[path.relative_to(folder).as_posix()]:
                raise OutputError(
                    f"{packed}: this is not {path.name}. Mend the disk, then go on with resume=True (--resume)."
                )
            path.unlink()
    return measured(folder, map(packed_name, map(Path, checksums)), operators)


def holds_pack(folder: Path) -> bool:
    return any(path.name.endswith(PACKED) for path in paths_in(folder))


def source_files(source: str | Path) -> tuple[Path, dict[Path, Stamp]]:
    """Return the folder of a model, and its files by name, but for hidden folders (.git) and unfinished files."""
    folder = named(source)
    if not folder.is_dir():
        if RunFolder(folder).is_unfinished:
            raise OutputError(f"The run of {folder} is unfinished. Finish it with resume=True (--resume) first.")
        raise ModelError(
            f"{source}: no such folder. Give the folder of a model; one on the hub has to be downloaded first."
        )
    stamps = dict[Path, Stamp]()
    with reading(folder):
        for path in paths_in(folder):
            name = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts[:-1])
            if not hidden and not path.match(PARTS) and (path.is_symlink() or not path.is_dir()):
                refuse_foreign(path, folder)
                stamps[name] = Stamp.of(path)
    return folder, stamps


def weight_files(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Return the safetensors files of a model, of `files`, without those of a checkpoint in a folder inside."""
    found = [path.relative_to(folder) for path in checkpoint_files(folder)]
    return found or [path for path in files if path.suffix == SUFFIX and len(path.parts) == 1]


def source_tensors(source: str | Path) -> tuple[Path, dict[Path, dict[str, Entry]]]:
    """Return the folder of a model, and the tensors of its files."""
    folder, files = source_files(source)
    if not (tensors := {path: entries(folder / path)[0] for path in weight_files(folder, files)}):
        raise ModelError(f"{folder} holds no safetensors file. Save the model as such first.")
    return folder, tensors


def write_folder(
    doing: str,
    folder: Path,
    files: Mapping[Path, Stamp],  # of the folder, as they have to be in the end, too
    writes: Mapping[Path, tuple[Path, Convert]],  # by file its new name, and what writes it
    staging: Staging,
    require: Callable[[Path], None] = lambda _: None,
) -> Path:
    step = begin(doing, len(writes))
    with staging.whole() as whole:
        for source, (name, convert) in writes.items():
            convert(folder / source, whole / name)
            step(str(source))
        require_unchanged({folder / name: stamp for name, stamp in files.items()})
        require(whole)
    return staging.output
