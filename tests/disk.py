"""A disk that loses, at a power cut, what was not flushed to it, or holds it by halves or in another order."""

import random
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any


@dataclass
class _Change:
    """What a disk was told to do `at` some moment, and from which moment on it is sure to have been done."""

    at: int
    kind: str
    path: Path
    file: int
    more: tuple[Any, ...] = ()
    kept: float = inf

    @property
    def is_data(self) -> bool:
        return self.kind in ("write", "cut")


POLICIES = ("lost", "all", "names", "data", "zeros", "any 0", "any 1")
"""What becomes of changes that were not flushed: none or all is done, only those of names or of data, names and zeros
in place of data, or each is done or not, or a write half, as it happens."""


class Disk:
    """A disk that keeps only what was flushed to it, and of all else what it happens to have written already.

    A flush of a file keeps its bytes, one of a folder the names in it. Where names change together, as a rename within
    two folders, both or none are changed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moments = 0
        self._changes: list[_Change] = []
        self._files: dict[Path, int] = {}  # the number of the file that has a name now

    def record(self, kind: str, path: Path, *more: Any) -> None:
        """Every operation, before it is done."""
        self.moments += 1
        match kind:
            case "open" if more and more[0] != "r":
                known = path in self._files
                file = self._files.setdefault(path, len(self._changes))
                if not known or more[0] == "w":
                    self._add("cut" if known else "name", path, file)
            case "write":
                self._add("write", path, self._files[path], *more)
            case "rename":
                target, file = Path(more[0]), self._files.get(path, -1)  # -1 is a folder
                self._files = {_moved(each, path, target): number for each, number in self._files.items()}
                self._add("rename", path, file, target)
            case "unlink" if path in self._files:
                self._add("unlink", path, self._files.pop(path))
            case "mkdir" | "rmdir":
                self._add(kind, path, -1)
            case "fsync":
                self._flush(path)

    def _add(self, kind: str, path: Path, file: int, *more: Any) -> None:
        self._changes.append(_Change(self.moments, kind, path, file, more))

    def _flush(self, path: Path) -> None:
        for change in self._changes:
            places = {change.path.parent, *(p.parent for p in change.more if isinstance(p, Path))}
            mine = change.file == self._files.get(path) if change.is_data else path in places
            if mine and change.kept == inf:
                change.kept = self.moments

    def after(self, moment: int, policy: str) -> dict[Path, bytes | None]:
        """What it holds if the power is cut after so many operations: bytes by name, None for folders."""
        coin = random.Random(f"{policy} {moment}")
        names: dict[Path, int] = {self.root: -1}
        data: dict[int, bytearray] = {}
        for change in self._changes:
            if change.at <= moment:
                done = 1.0 if change.kept <= moment else _done(change, policy, coin)
                if done:
                    _apply(change, done, policy == "zeros" and change.kept > moment, names, data)
        whole = sorted(names, key=lambda path: len(path.parts))
        held: dict[Path, bytes | None] = {}
        for path in whole:
            if path == self.root or path.parent in held:
                held[path] = None if names[path] < 0 else bytes(data.get(names[path], b""))
        return held


def _done(change: _Change, policy: str, coin: random.Random) -> float:
    match policy:
        case "lost":
            return 0.0
        case "all" | "zeros":
            return 1.0
        case "names":
            return float(not change.is_data)
        case "data":
            return float(change.is_data)
    return coin.choice((0.0, 0.5, 1.0)) if change.kind == "write" else coin.choice((0.0, 1.0))


def _apply(change: _Change, done: float, zeros: bool, names: dict[Path, int], data: dict[int, bytearray]) -> None:
    match change.kind:
        case "write":
            begin, content = change.more
            content = content[: round(done * len(content))]
            held = data.setdefault(change.file, bytearray())
            held.extend(bytes(max(0, begin + len(content) - len(held))))
            held[begin : begin + len(content)] = bytes(len(content)) if zeros else content
        case "cut":
            data[change.file] = bytearray()
        case "rename" if change.file < 0:
            if change.path in names:
                moved = {_moved(path, change.path, change.more[0]): file for path, file in names.items()}
                names.clear()
                names.update(moved)
        case "rename":
            if names.get(change.path) == change.file:
                del names[change.path]
            names[change.more[0]] = change.file
        case "unlink" | "rmdir":
            if names.get(change.path) == change.file:
                del names[change.path]
        case "name" | "mkdir":
            names[change.path] = change.file


def _moved(path: Path, source: Path, target: Path) -> Path:
    """The name of a file or folder once a folder that it may lie in, or it itself, was renamed."""
    return target / path.relative_to(source) if path.is_relative_to(source) else path


def put(held: dict[Path, bytes | None]) -> None:
    """Make the files and folders that a disk holds."""
    for path, content in held.items():
        path.mkdir() if content is None else path.write_bytes(content)
