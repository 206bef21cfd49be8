"""A layer under every file operation of a run: it is told of each before it is done, and may let it fail.

It sits where Python meets the system, so it sees what buffers write when they are full or closed. What it cannot see is
what safetensors does in Rust: that is one operation, "open".
"""

import builtins
import errno
import fcntl
import io
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convexprune._runs import executors

OnOperation = Callable[..., None]  # (kind, path, *more), before the operation is done; what it raises comes out of it
# What a system says when such an operation fails. Most of these have more than one answer.
ANSWERS = {
    "open": errno.EACCES, "read": errno.EIO, "write": errno.ENOSPC, "fsync": errno.EIO, "rename": errno.EIO,
    "flock": errno.ENOLCK, "mkdir": errno.ENOSPC, "unlink": errno.EACCES, "rmdir": errno.EACCES, "stat": errno.EIO,
    "list": errno.EACCES, "mmap": errno.ENOMEM, "truncate": errno.EIO,
}  # fmt: skip
_BY_PATH = {
    "replace": "rename", "rename": "rename", "mkdir": "mkdir", "unlink": "unlink", "remove": "unlink", "rmdir": "rmdir",
    "stat": "stat", "lstat": "stat", "listdir": "list", "scandir": "list", "fsync": "fsync", "ftruncate": "truncate",
    "open": "open", "link": "rename",
}  # fmt: skip


def failing(kind: str, path: Path) -> OSError:
    """What a system says of such an operation; of a read or a write it does not name the file."""
    code = ANSWERS[kind]
    named = () if kind in ("read", "write", "fsync", "flock", "mmap", "truncate") else (str(path),)
    return OSError(code, os.strerror(code), *named)


class _Watch:
    def __init__(self, roots: Sequence[Path], on_operation: OnOperation) -> None:
        self.roots = tuple(f"{os.path.abspath(root)}{os.sep}" for root in roots)
        self.on_operation = on_operation
        self.paths: dict[int, Path] = {}  # by descriptor
        self.open = io.open

    def path(self, place: Any, within: int | None = None) -> Path | None:
        """Of what a function was given, if it is below the roots: a path, a descriptor or a file."""
        if hasattr(place, "fileno"):
            place = place.fileno()
        if isinstance(place, int):
            return self.paths.get(place)
        parent = self.paths.get(within, Path()) if within is not None else Path()
        path = os.path.abspath(parent / os.fsdecode(place))
        return Path(path) if f"{path}{os.sep}".startswith(self.roots) else None

    def opened(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
        """In place of `open`."""
        path = self.path(file)
        if path is None:
            return self.open(file, mode, buffering, *text, **more)
        raw = _Raw(self, path, file, mode.replace("b", "").replace("t", ""), more.pop("opener", None))
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        return kind(raw) if "b" in mode else io.TextIOWrapper(kind(raw), *text, **more)

    def function(self, module: Any, name: str, kind: str) -> Any:
        """In place of a function whose first argument is a path, a descriptor or a file."""
        real = getattr(module, name)

        def told(place: Any = ".", *rest: Any, **more: Any) -> Any:
            path = self.path(place, more.get("dir_fd"))
            if path is not None:
                creates = name == "open" and bool(rest[0] & os.O_CREAT)
                self.on_operation(kind, path, *([self.path(rest[0])] if kind == "rename" else ["a"] if creates else []))
            result = real(place, *rest, **more)
            if name == "open" and path is not None:
                self.paths[result] = path
            return result

        return told

    def close(self, descriptor: int, real: Callable[[int], None] = os.close) -> None:
        self.paths.pop(descriptor, None)
        real(descriptor)


class _Raw(io.FileIO):
    """A file without a buffer that tells of each read and write."""

    def __init__(self, watch: _Watch, path: Path, file: Any, mode: str, opener: Any) -> None:
        self._watch, self._path = watch, path
        if not isinstance(file, int):
            watch.on_operation("open", path, mode)
        super().__init__(file, mode, opener=opener)
        watch.paths[self.fileno()] = path

    def write(self, data: Any, /) -> int:
        end = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        self._watch.on_operation("write", self._path, end, bytes(data))
        return super().write(data)

    def readinto(self, buffer: Any, /) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._watch.on_operation("read", self._path)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._watch.on_operation("read", self._path)
        return super().readall()

    def close(self) -> None:
        if not self.closed:
            self._watch.paths.pop(self.fileno(), None)
        super().close()


@contextmanager
def watched(roots: Sequence[Path], on_operation: OnOperation) -> Iterator[None]:
    """Inside, `on_operation` is called before each operation on a file below `roots`, in this process and its forks."""
    watch = _Watch(roots, on_operation)
    with ExitStack() as stack:
        for name, kind in _BY_PATH.items():
            if hasattr(os, name):
                stack.enter_context(patch.object(os, name, watch.function(os, name, kind)))
        stack.enter_context(patch.object(os, "close", watch.close))
        stack.enter_context(patch.object(fcntl, "flock", watch.function(fcntl, "flock", "flock")))
        for module in (io, builtins):
            stack.enter_context(patch.object(module, "open", watch.opened))
        for module in [m for name, m in sys.modules.items() if name.startswith("convexprune")]:
            for name, kind in {"load_file": "open", "safe_open": "open", "mmap": "mmap"}.items():
                if callable(vars(module).get(name)):
                    stack.enter_context(patch.object(module, name, watch.function(module, name, kind)))
        yield


@contextmanager
def forks(first: Callable[[], AbstractContextManager[object]] = nullcontext) -> Iterator[list[Any]]:
    """Inside, the workers of a pool, of which a list is made, are forks, so that they are quick.

    The `first` of them works inside of a context of its own.
    """
    real, started = multiprocessing.get_context("fork"), list[Any]()

    def process(target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> Any:
        def do(*args: Any) -> None:
            with first():
                target(*args)

        started.append(real.Process(target=target if started else do, args=args, daemon=daemon))
        return started[-1]

    context = SimpleNamespace(Pipe=real.Pipe, Process=process)
    names = vars(multiprocessing) | {"get_context": lambda _: context}
    with patch.object(executors, "multiprocessing", SimpleNamespace(**names)), patch.object(executors, "POLL", 0.01):
        yield started


def stratified(kinds: Sequence[str], each: int) -> list[int]:
    """Moments at which operations of every kind come: so many `each`, the first and the last among them."""
    found = []
    for kind in sorted(set(kinds)):
        moments = [moment for moment, one in enumerate(kinds) if one == kind]
        ends = {moments[0], moments[-1]} if each > 1 else {moments[len(moments) // 2]}
        rest = [moment for moment in moments if moment not in ends]
        found += [*ends, *random.Random(kind).sample(rest, min(len(rest), each - len(ends)))]
    return sorted(found)


class Memory(TorchDispatchMode):
    """Inside, new tensors are counted; those after the `last` one fail, as they do on a CPU, on a GPU and in Python."""

    def __init__(self, last: float = inf) -> None:
        super().__init__()
        self.count, self.last = 0, last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        if any(t.device.type != "meta" and t.untyped_storage()._cdata not in known for t in _tensors(result)):
            self.allocate()
        return result

    def allocate(self) -> None:
        self.count += 1
        if self.count > self.last:
            raise (RuntimeError(OF_TORCH), torch.OutOfMemoryError(OF_CUDA), MemoryError())[self.count % 3]

    def bytearray(self, *given: Any) -> bytearray:
        self.allocate()
        return bytearray(*given)


OF_TORCH = (
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
)
OF_CUDA = "CUDA out of memory. Tried to allocate 8 bytes."


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
