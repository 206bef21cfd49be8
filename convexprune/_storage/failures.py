"""Errors of the file system, raised again as errors that name the file and say how to go on."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convexprune.errors import ConvexpruneError, ModelError, OutputError

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


class _DiskError(OutputError):
    """Error of the file system, to which a run adds how it goes on."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk while a file is written into an OutputError that says what to do."""
    with _as_output_error(f"{path} cannot be written"):
        yield


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Turn any error of the file system during a run that can be resumed into an OutputError that says so."""
    try:
        with _as_output_error(f"The run in {folder} has stopped"):
            yield
    except _DiskError as error:
        raise OutputError(f"{error} What is finished is kept: go on with resume=True (--resume).") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name the file: that of an open file does not."""
    try:
        yield
    except OSError as cause:
        if cause.errno is not None and cause.filename is None:
            cause.filename = str(path)
        raise


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the disk while a file of a model is read into a ModelError."""
    try:
        yield
    except OutputError:
        raise
    except OSError as cause:
        raise ModelError(f"{path} cannot be read: {cause.strerror or cause}.") from cause


@contextmanager
def _as_output_error(what: str) -> Iterator[None]:
    try:
        yield
    except (ConvexpruneError, ConnectionError):  # a broken pipe is of standard output, not of the disk
        raise
    except OSError as cause:
        advice = _ADVICE.get(cause.errno or 0, "Mend the disk")
        raise _DiskError(f"{what}: {cause}. {advice}, and start again.") from cause
