"""Files that appear whole or not at all, their checksums, and locks that vanish with the process that holds them."""

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from convexprune.errors import ConvexpruneError, DependencyError, ModelError, OutputError

PARTS = ".*.part"  # files that are being written, or were when their process was killed
CHUNK = 1 << 20  # bytes that are read at once


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk while a file is written into one that says how to go on.

    Args:
        path: of the file.

    Raises:
        OutputError: the disk is full or fails.
    """
    with _as_output_error(f"{path} cannot be written"):
        yield


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Turn any error of the file system during a run into one that says how to go on.

    Args:
        folder: of the run.

    Raises:
        OutputError: a file cannot be read, looked at, locked or removed, or is gone.
    """
    with _as_output_error(f"The run in {folder} has stopped"):
        yield


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name the file: that of an open file does not.

    Args:
        path: of the file.
    """
    try:
        yield
    except OSError as cause:
        if cause.errno is not None and cause.filename is None:
            cause.filename = str(path)
        raise


@contextmanager
def _as_output_error(what: str) -> Iterator[None]:
    try:
        yield
    except (ConvexpruneError, ConnectionError):  # the second is said of what is printed, when nobody reads it
        raise
    except OSError as cause:
        advice = _ADVICE.get(cause.errno or 0, "Mend the disk")
        raise OutputError(
            f"{what}: {cause}. {advice}, and start again; a run with resume=True (--resume), which keeps what is done."
        ) from cause


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Make the folder readable and writable for this user"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "Keep others from removing what is in use"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n)"),
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP), "Use a file system that has locks (flock)"),
    errno.EROFS: "Make the file system writable",
    errno.ELOOP: "No link is followed here: remove it",
    errno.ENOMEM: "Free memory",
}


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a new file atomically: it is written under another name, flushed, and becomes `path` if the block ends
    well.

    Its folder is made if need be.

    Args:
        path: of the file.

    Yields:
        The open file.

    Raises:
        OutputError: the disk is full or fails; nothing is left behind.
    """
    # Whoever else may write to the folder cannot know this name, and a link that has it would not be followed.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with writing(path):
            make_folder(path.parent)
            with temporary.open("xb") as file:
                yield file
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it lies in, such that they are there after a power cut.

    Args:
        folder: to make; it may be there already.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync(path.parent)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, such that after a power cut either all of it is there or nothing.

    Args:
        temporary: the file.
        path: its name.
    """
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def flush(folder: Path) -> None:
    """Flush all that lies in a folder to the disk, whoever wrote it.

    Args:
        folder: the folder.
    """
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def write(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write bytes: every byte of a run goes through here.

    Args:
        file: open to be written.
        data: the bytes.
    """
    file.write(data)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file of a model, as every file of a run is written.

    Args:
        source: the file.
        path: of the copy.

    Raises:
        ModelError: `source` cannot be read.
        OutputError: the disk is full or fails.
    """
    with reading(source), source.open("rb") as file, atomic_write(path) as copied:
        while data := file.read(CHUNK):
            write(copied, data)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the disk while a file of a model is read into one of ours.

    Args:
        path: of the file.

    Raises:
        ModelError: the file is gone, may not be read, or the disk fails.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as cause:
        raise ModelError(f"{path} cannot be read: {cause.strerror or cause}.") from cause


class Stamp(NamedTuple):
    """What changes when a file is written to or replaced.

    Args:
        inode: its number in the file system.
        size: bytes.
        modified: nanoseconds since the epoch.
    """

    inode: int
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The stamp of a file as it is now.

        Args:
            path: of the file.

        Returns:
            The stamp.

        Raises:
            ModelError: the file is missing, or is a pipe or a device, which would be waited for.
        """
        with reading(path):
            found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path} is no ordinary file. Put the file itself here.")
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; NaN and infinity are kept, as Python reads them back.

    Args:
        path: of the file.
        value: that JSON can hold.

    Raises:
        OutputError: the disk is full or fails.
    """
    with atomic_write(path) as file:
        write(file, json.dumps(value, indent=1).encode())


def read_text(path: Path, longest: int) -> str:
    """The text of a file.

    Args:
        path: of the file.
        longest: the most bytes that are read.

    Returns:
        The text.

    Raises:
        OutputError: the file is missing, too long, or no text.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OutputError(f"{path}: there is no such file.")
        if path.stat().st_size > longest:
            raise OutputError(f"{path} has {path.stat().st_size:,} bytes, and at most {longest:,} are read.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise OutputError(f"{path} is damaged: it is no text.") from cause
    except OutputError:
        raise
    except OSError as cause:
        raise OutputError(f"{path} cannot be read: {cause.strerror or cause}.") from cause


def read_json(path: Path) -> Any:
    """The value of the JSON file at `path`; None if it is missing or is not JSON."""
    try:
        with naming(path):
            return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def write_notes(path: Path, value: Any) -> None:
    """Write a value as `write_json` does, with its checksum.

    Args:
        path: of the file.
        value: that JSON can hold.

    Raises:
        OutputError: the disk is full or fails.
    """
    write_json(path, {"checksum": _checksum(value), "notes": value})


def read_notes(path: Path) -> Any:
    """The value that `write_notes` wrote to `path`; None if it is missing or is not what was written."""
    match read_json(path):
        case {"checksum": checksum, "notes": value} if checksum == _checksum(value):
            return value
    return None


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sha256(path: Path) -> str | None:
    """The checksum of the file at `path`, which is never whole in memory; None if it is missing."""
    try:
        with naming(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def checksum_inside(folder: Path, name: str) -> str | None:
    """The checksum of a file named by someone else.

    Args:
        folder: in which the file has to be.
        name: its path in the folder.

    Returns:
        The checksum; None if there is no such file, or it is outside of the folder.
    """
    path = Path(name)
    inside = not path.is_absolute() and ".." not in path.parts and (folder / path).is_file()  # nor a pipe or a device
    return sha256(folder / path) if inside else None


def read_ahead(path: Path, begin: int = 0, length: int = 0) -> None:
    """Ask the system to bring bytes of a file into its cache while others compute.

    Only a hint: a system that takes none, or a file that is gone, is no error.

    Args:
        path: of the file.
        begin: the first byte.
        length: how many bytes; 0 is all that follow.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS, nor on Windows
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold a lock in the block, if it was free; it is gone with the process whatever ends it.

    It works on any shared file system that has flock.

    Args:
        path: of the lock file, which is made if need be.
        shared: whether many may hold it at once, and nobody may hold it alone meanwhile.

    Yields:
        Whether the lock was free, and is held now.

    Raises:
        DependencyError: the system has no such locks.
        OutputError: the file cannot be made, or is a link.
    """
    try:
        import fcntl
    except ImportError as cause:  # on Windows
        raise DependencyError(f"{path}: a run in a folder needs the file locks of a POSIX system.") from cause
    with writing(path):
        descriptor = _follow_no_link(path, os.O_RDWR | os.O_CREAT)
    with os.fdopen(descriptor, "rb") as file:
        try:
            with naming(path):
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def overwrite(path: Path, text: str) -> None:
    """Put a note that nothing depends on into a file; not if it is a link.

    Args:
        path: of the file.
        text: the note.
    """
    with open(path, "w", opener=_follow_no_link) as file:
        file.write(text)


def _follow_no_link(path: str | Path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # not on Windows


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
