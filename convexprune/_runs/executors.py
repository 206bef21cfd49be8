"""Executors of a run: this process, a pool of processes, the ranks of a launcher, or a Ray cluster.

Executors differ only in who calls `prune_claimed`: the queue is the run's folder, where a lock claims a layer. The pool
is not of concurrent.futures, which gives up a whole pool when a worker dies; here the surviving workers go on.
"""

import multiprocessing
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import torch

from convexprune import errors
from convexprune._device.machine import installation, threads
from convexprune._device.memory import release_unused, use_gpu, within_memory
from convexprune._device.switches import pinned
from convexprune._layerwise.folder_store import FolderStore, RankStore
from convexprune._layerwise.model import AbstractModel, DecoderLayer
from convexprune._layerwise.processes import ProcessGroup
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.work import Work, prune_claimed
from convexprune._runs.folder import differences
from convexprune._schema.functions import EXECUTORS
from convexprune._storage.batches import room_on
from convexprune._storage.failures import working
from convexprune.report import OnOperator


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
            raise errors.PruningError(
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

    def is_lost(self) -> bool:
        """Return True if the process ended before the work."""
        if self._process.is_alive() or self._process.exitcode == 0:
            return False
        try:
            raise self._errors.recv()
        except EOFError:
            return True

    def exit_code(self) -> int | None:
        return self._process.exitcode

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


def _do_and_send(job: Job, device: str, pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job.do(device)
    except errors.ConvexpruneError as error:
        pipe.send(error)
        raise SystemExit(1) from error


RETRIES = 3  # workers started again, for each that there is, before a run is given up
POLL = 0.2  # seconds between two looks at the workers
RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


@dataclass(frozen=True)
class AbstractExecutor(ABC):
    """An executor finishes all layers of a run; `spawns` says whether in child processes of this process."""

    spawns: ClassVar[bool] = False
    rank: int | None = None  # the number of this process, if several processes open the run's folder on purpose
    processes: int = 1  # that share the threads of this process
    together: int = 1  # workers that can share a layer

    @abstractmethod
    def run(self, job: Job, model: AbstractModel, store: FolderStore, on_operator: OnOperator) -> None:
        """Return when all layers are finished."""


class Serial(AbstractExecutor):
    def run(self, job: Job, model: AbstractModel, store: FolderStore, on_operator: OnOperator) -> None:
        with threads(job.threads):
            prune_claimed(model, store, job.work, on_operator)


class Ranks(AbstractExecutor):
    """A process of torchrun or srun, started with the same command as its peers.

    Ranks meet in the run's folder only; if layers wait for each other, the ranks prune a layer together. Launchers
    divide the threads.
    """

    @classmethod
    def here(cls) -> "Ranks":
        for rank, size in RANKS:
            if rank in os.environ and size in os.environ:
                number, count = (os.environ[name] for name in (rank, size))
                if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
                    raise errors.RecipeError(
                        f"{rank}={number!r}, {size}={count!r}: with executor='ranks', {rank} has to be a number from 0 "
                        f"to {size} - 1. torchrun and srun set both."
                    )
                return cls(int(number), together=int(count))
        raise errors.RecipeError(
            "executor='ranks' is for processes that torchrun or srun starts: RANK or SLURM_PROCID is not set."
        )

    def run(self, job: Job, model: AbstractModel, store: FolderStore, on_operator: OnOperator) -> None:
        with threads(job.threads):
            if job.work.settings.prefix == "dense":
                prune_claimed(model, store, job.work, on_operator)
                return
            with ProcessGroup.connected(self.rank or 0, self.together) as ranks:
                ours = RankStore(store.folder, store.count, model.device, ranks, store.room)
                prune_claimed(model, ours, job.work.of_rank(ranks), (lambda _: None) if ranks.rank else on_operator)


@dataclass(frozen=True)
class Pool(AbstractExecutor):
    """Processes on this machine, a process for each of `devices`; a lost process is restarted."""

    spawns = True
    devices: Sequence[str] = ()

    def run(self, job: Job, model: AbstractModel, store: FolderStore, on_operator: OnOperator) -> None:
        watch = _Watch(store, on_operator)
        release_unused()  # a worker may compute on the GPU that this process has used
        workers, lost = [Worker(job, device) for device in self.devices], 0
        try:
            while not watch.all_finished():
                time.sleep(POLL)
                for i, worker in enumerate(workers):
                    if worker.is_lost():
                        lost += 1
                        if lost > RETRIES * len(self.devices):
                            raise errors.PruningError(
                                f"Workers were lost {lost} times; the last ended with {worker.exit_code()}. Is memory "
                                "short? What is finished is kept: go on with resume=True (--resume)."
                            )
                        workers[i] = Worker(job, worker.device)
        finally:
            for worker in workers:
                worker.stop()


class OnRay(AbstractExecutor):
    """Tasks of a Ray cluster whose nodes all see the run's folder; Ray restarts lost tasks."""

    def run(self, job: Job, model: AbstractModel, store: FolderStore, on_operator: OnOperator) -> None:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayTaskError  # pyright: ignore[reportMissingImports]

        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        on_gpu = model.device.type == "cuda"
        task = ray.remote(num_cpus=job.threads, num_gpus=int(on_gpu), max_retries=RETRIES)(Job.do)
        watch = _Watch(store, on_operator)
        waiting = [task.remote(job, "cuda" if on_gpu else "cpu") for _ in range(self.processes)]
        try:
            while waiting:
                done, waiting = ray.wait(waiting, timeout=POLL)
                ray.get(done)
                watch.all_finished()
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None
        finally:
            for task in waiting:
                ray.cancel(task, force=True)


def make_executor(name: str, workers: int, device: str) -> AbstractExecutor:
    match name:
        case "serial":
            return Serial()
        case "ranks":
            return Ranks.here()
        case "pool":
            gpus = [f"cuda:{i % torch.cuda.device_count()}" for i in range(workers)] if device == "cuda" else []
            return Pool(processes=workers, devices=gpus or [device] * workers)
        case "ray":
            if find_spec("ray") is None:
                raise errors.DependencyError(f"executor='ray' needs Ray: {errors.install_hint('ray')}")
            return OnRay(processes=workers)
    raise errors.RecipeError(errors.unknown("executor", name, EXECUTORS))


class _Watch:
    """Call `on_operator` with the reports of layers that were finished since the last look."""

    def __init__(self, store: FolderStore, on_operator: OnOperator) -> None:
        self._store, self._on_operator = store, on_operator
        self._reported = {n for n in range(store.count) if store.is_finished(n)}

    def all_finished(self) -> bool:
        for n in range(self._store.count):
            if n not in self._reported and self._store.is_finished(n):
                self._reported.add(n)
                for report in self._store.reports(n):
                    self._on_operator(report)
        return len(self._reported) == self._store.count


def check_patterns(layers: Iterable[DecoderLayer], settings: LayerSettings) -> None:
    """Refuse, before any work, a pattern that some operator does not fit."""
    for layer in layers:
        for operator in layer.operators:
            try:
                settings.pattern_of(f"{layer.name}.{operator.name}").check(*operator.shape)
            except errors.PatternError as error:
                raise errors.PatternError(f"{layer.name}.{operator.name}: {error}") from error
