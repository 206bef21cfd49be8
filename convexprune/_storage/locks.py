"""Locks that vanish with their process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convexprune._storage.failures import naming, writing
from convexprune.errors import DependencyError


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
