"""Files that appear whole or not at all, their checksums and locks; notes are JSON with a checksum."""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from convexprune._storage.failures import naming, reading, writing
from convexprune.errors import DependencyError, ModelError, OutputError

PARTS = f".{'[0-9a-f]' * 16}.part"  # files that are being written, or were when their process was killed
CHUNK = 1 << 20  # bytes that are read at once


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a new file, and a folder for it, atomically: under another name, renamed if the block ends well."""
    # Whoever else may write to the folder cannot know this name, and a link that has it would not be followed.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with writing(path):
            make_folder(path.parent)
            with temporary.open("xb") as file:
                yield file
            publish(temporary, path)
    finally:
        with suppress(OSError):  # gone; or it never was there, as a read-only file system says in its own way
            temporary.unlink()


def make_folder(folder: Path) -> None:
    """Make a `folder`, and those that it lies in, such that they are there after a power cut."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync(path.parent)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file or folder its name, such that after a power cut either all of it is there or nothing."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def flush(folder: Path) -> None:
    """Flush all that lies in a `folder` to the disk, whoever wrote it."""
    for path in (*paths_in(folder), folder):
        _sync(path)


def paths_in(folder: Path) -> list[Path]:
    """Return the paths of all files and folders below a `folder`, sorted."""
    found = os.walk(folder, onerror=_not_listed)
    return sorted(Path(place) / name for place, folders, files in found for name in (*folders, *files))


def _not_listed(error: OSError) -> NoReturn:
    raise error


def write(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write bytes: every byte of a run goes through here."""
    file.write(data)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        write(file, text.encode())


def copy_file(source: Path, path: Path) -> None:
    """Copy a file of a model, as every file of a run is written."""
    with reading(source), source.open("rb") as file, atomic_write(path) as copied:
        while data := file.read(CHUNK):
            write(copied, data)


class Stamp(NamedTuple):
    """Facts of a file that change when it is written to or replaced; `modified` in nanoseconds since the epoch."""

    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        with reading(path):
            found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path} is no ordinary file. Put the file itself here.")
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


def require_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Refuse files of a model that have been written to or replaced since their stamps were taken."""
    for path, stamp in stamps.items():
        if Stamp.of(path) != stamp:
            raise has_changed(path)


def has_changed(path: Path) -> ModelError:
    return ModelError(f"{path} has changed since it was opened. Put it back as it was, and start again.")


def named(source: str | Path) -> Path:
    """Return the path of a model or a run, with "~" expanded; an empty text is no path, though pathlib has it so."""
    if not isinstance(source, str | Path):
        raise ModelError(f"A value of type {type(source).__name__} is no folder. Give the path of one.")
    if not str(source).strip():
        raise ModelError("An empty text is no folder. Give the folder; '.' is the current one.")
    try:
        return Path(source).expanduser()
    except RuntimeError as cause:
        raise ModelError(f"{source}: {cause} Write the folder without '~'.") from cause


def sha256(path: Path) -> str | None:
    """Return the checksum of the file at `path`, which is never whole in memory; None if it is missing."""
    try:
        with naming(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def checksums(folder: Path) -> dict[str, str]:
    files = (path for path in paths_in(folder) if path.is_file())
    return {path.relative_to(folder).as_posix(): str(sha256(path)) for path in files}


def checksum_inside(folder: Path, name: str) -> str | None:
    """Return the checksum of a file that someone else has named; None if there is no such file in the folder."""
    path = Path(name)
    inside = not path.is_absolute() and ".." not in path.parts and (folder / path).is_file()  # nor a pipe or a device
    return sha256(folder / path) if inside else None


def read_ahead(path: Path, begin: int = 0, length: int = 0) -> None:
    """Ask the system to bring bytes of a file into its cache; `length` 0 is all that follow.

    Only a hint: a system that takes none, or a file that is gone, is no error.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS, nor on Windows
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_foreign(path: Path, folder: Path) -> None:
    """Refuse a file of a model that is a link out of the model's folder, but for the blobs of the hub's cache."""
    place, target = (Path(os.path.realpath(each)) for each in (folder, path))  # which takes links in a circle
    blobs = place.parents[1] / "blobs" if place.parent.name == "snapshots" else place
    if not target.is_relative_to(place) and target.parent != blobs:
        raise ModelError(
            f"{path} is a link to {target}, outside of the model's folder, and would be copied to the result. Put "
            "the file itself into the folder, or remove the link."
        )


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; NaN and infinity are kept, as Python reads them back."""
    write_text(path, json.dumps(value, indent=1))


def write_settings(path: Path, value: Any) -> None:
    """Write a file of settings as transformers does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_text(path: Path, longest: int) -> str:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OutputError(f"{path}: there is no such file. Is it the right folder?")
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
    """Return the value of the JSON file at `path`; None if it is missing or is not JSON."""
    try:
        with naming(path):
            return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def write_notes(path: Path, value: Any) -> None:
    """Write a value as `write_json` does, with its checksum."""
    write_json(path, {"checksum": _checksum(value), "notes": value})


def read_notes(path: Path) -> Any:
    """Return the value that `write_notes` wrote to `path`; None if it is missing or is not what was written."""
    match read_json(path):
        case {"checksum": checksum, "notes": value} if checksum == _checksum(value):
            return value
    return None


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold a lock inside the block, and yield True; yield False if it is not free. It ends with the process.

    Any shared file system that has flock will do. The lock file is made if need be. Many may hold a `shared` lock.
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
    """Put a note that nothing depends on into a file; not if it is a link."""
    with open(path, "w", opener=_follow_no_link) as file:
        file.write(text)


def _follow_no_link(path: str | Path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # not on Windows
