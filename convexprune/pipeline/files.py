"""Files that appear whole or not at all, their checksums, and locks that vanish with the process that holds them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from convexprune.errors import DependencyError, OutputError

PARTS = ".*.part"  # files that are being written, or were when their process was killed


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk says while `path` is written into one error that says how to go on.

    Raises:
        OutputError: the disk is full or fails.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as cause:
        raise OutputError(
            f"{path} cannot be written: {cause}. Make room or mend the disk, then go on with resume=True (--resume): "
            "what is finished is kept."
        ) from cause


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A new file, written under another name and flushed to the disk, that becomes `path` if the block ends well.

    Its folder is made if need be.

    Raises:
        OutputError: the disk is full or fails; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, such that after a power cut either all of it is there or nothing."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def write(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Every byte of a run goes through here."""
    file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value that JSON can hold; NaN and infinity are kept, as Python reads them back.

    Raises:
        OutputError: the disk is full or fails.
    """
    with appearing(path) as file:
        write(file, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file; None if it is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def write_notes(path: Path, value: Any) -> None:
    """Write a value as `write_json` does, with its checksum.

    Raises:
        OutputError: the disk is full or fails.
    """
    write_json(path, {"checksum": _checksum(value), "notes": value})


def read_notes(path: Path) -> Any:
    """The value that `write_notes` wrote; None if it is missing or is not what was written."""
    match read_json(path):
        case {"checksum": checksum, "notes": value} if checksum == _checksum(value):
            return value
    return None


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sha256(path: Path) -> str | None:
    """The checksum of a file, which is never whole in memory; None if it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def read_ahead(path: Path, begin: int = 0, length: int = 0) -> None:
    """Ask the system to bring bytes of a file, all from `begin` if `length` is 0, into its cache while others compute.

    Only a hint: a system that takes none, or a file that is gone, is no error.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS, nor on Windows
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Whether the lock on `path` was free; it is then held in the block, and gone with the process whatever ends it.

    Many may share a lock, and nobody else can have it meanwhile. Works on any shared file system that has flock.

    Raises:
        DependencyError: the system has no such locks.
    """
    try:
        import fcntl
    except ImportError as cause:  # on Windows
        raise DependencyError(f"{path}: a run in a folder needs the file locks of a POSIX system.") from cause
    with path.open("ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
