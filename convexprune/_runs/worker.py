"""A worker of a run: its job, and its process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

from convexprune._device.machine import installation, threads
from convexprune._device.memory import use_gpu, within_memory
from convexprune._device.switches import pinned
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.model import AbstractModel
from convexprune._layerwise.work import Work, prune_claimed
from convexprune._runs.identity import differences
from convexprune._storage.batches import room_on
from convexprune._storage.failures import working
from convexprune.errors import ConvexpruneError, PruningError


@dataclass(frozen=True, eq=False)
class Job:
    folder: Path
    work: Work
    open_model: Callable[..., AbstractModel]  # with the keyword "device"
    threads: int
    installed: Mapping[str, str]  # result of `machine.installation` at the beginning of the run
    needed: int = 0  # bytes of GPU memory that the run needs

    @pinned()  # a worker imports the user's script, which may have set switches
    def do(self, device: str) -> None:
        """Prune layers until none is left."""
        use_gpu(device)
        if differing := differences(dict(self.installed), installation(device)):
            raise PruningError(
                f"This worker differs from where the run began, and so would its bits: {'; '.join(differing)}. Workers "
                "need the same code, versions, numerical switches, and kind of processor or GPU."
            )

        with within_memory(), working(self.folder.parent), threads(self.threads):
            model = self.open_model(device=device)
            store = FolderStore(self.folder, len(model.layers), device, room_on(device, self.needed))
            prune_claimed(model, store, self.work, lambda _: None)


class Worker:
    """A process for a job. The process ends with its parent."""

    def __init__(self, job: Job, device: str) -> None:
        self.device = device
        context = multiprocessing.get_context("spawn")  # a forked torch hangs in its threads, and has no CUDA
        self._errors, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_do_and_send, args=(job, device, theirs), daemon=True)
        with _no_interrupts():
            self._process.start()
        theirs.close()

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def is_lost(self) -> bool:
        """Return True if the process ended before the work."""
        if self._process.is_alive() or self._process.exitcode == 0:
            return False
        try:
            raise self._errors.recv()
        except EOFError:
            return True

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which a terminal sends to all: only the waiting process reacts."""
    resource_tracker.ensure_running()  # started with the first worker, it would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, in the middle of any computation."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do_and_send(job: Job, device: str, errors: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job.do(device)
    except ConvexpruneError as error:
        errors.send(error)
        raise SystemExit(1) from error
