"""What a GPU is asked for, and in which order, by a fake that computes on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import SETTINGS, checksums
from torch import Tensor

import convexprune
from convexprune import errors
from convexprune._api import in_folder
from convexprune._api.in_memory import InMemory
from convexprune._device import memory, transfer
from convexprune._device.transfer import BUFFERS, GpuLane, Lane, lane_to, sending
from convexprune._layerwise.context import recorded
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.processes import ProcessGroup
from convexprune._runs import executors
from convexprune._storage import batches
from convexprune._storage.batches import Batches


class Stream:
    """Copies that are made when somebody waits for them, no sooner."""

    def __init__(self, device: Any = None) -> None:
        self.work: list[Callable[[], object]] = []

    def do(self) -> None:
        while self.work:
            self.work.pop(0)()

    def wait_stream(self, other: "Stream") -> None:
        """What is computed here is computed at once."""

    def wait_event(self, event: "Event") -> None:
        event.synchronize()


class Event:
    """Which work of a stream is waited for: all of it."""

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.do()


COPY, TO, EMPTY = Tensor.copy_, Tensor.to, torch.empty


class Cuda:
    """A GPU whose copies come too late if a buffer was used again. The log has what was asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main, self._inside = Stream(), list[Stream]()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        made = {"Stream": Stream, "Event": Event, "stream": self.stream, "current_stream": lambda _: self.main}
        for name, fake in made.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(Tensor, "copy_", lambda *args, **more: self._copy(*args, **more))
        patch.setattr(Tensor, "to", lambda *args, **more: self._to(*args, **more))
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        patch.setattr(torch, "empty", self._empty)

    @contextmanager
    def stream(self, chosen: Stream) -> Iterator[None]:
        self._inside.append(chosen)
        yield
        self._inside.pop()

    def _copy(self, tensor: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking:
            return COPY(tensor, other)
        self._inside[-1].work.append(lambda: COPY(tensor, other))
        return tensor

    def _to(self, tensor: Tensor, *args: Any, non_blocking: bool = False, **more: Any) -> Tensor:
        if not non_blocking:
            return TO(tensor, *args, **more)
        there = torch.full_like(tensor, -1)
        self._inside[-1].work.append(lambda: COPY(there, tensor))
        return there

    def _empty(self, *shape: Any, pin_memory: bool = False, **more: Any) -> Tensor:
        self.log += ["pinned"] if pin_memory else []
        return EMPTY(*shape, **more)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    fake.install(monkeypatch)
    return fake


def numbers(count: int) -> list[Tensor]:
    return [torch.full((2, 3), float(i)) for i in range(count)]


def test_tensors_reach_the_host_in_their_order_through_few_buffers(cuda: Cuda):
    lane, taken = GpuLane(torch.device("cpu")), list[Tensor]()
    for tensor in (sent := numbers(8)):
        lane.to_host(tensor, lambda host: taken.append(host.clone()))
        tensor.fill_(-1)  # as what is computed next may
    assert len(taken) == len(sent) - BUFFERS  # the host has not waited for these
    lane.flush()
    assert [t.tolist() for t in taken] == [t.tolist() for t in numbers(8)]
    assert cuda.log.count("pinned") == BUFFERS
    lane.to_host(torch.ones(50), lambda host: taken.append(host.clone()))  # a larger one
    lane.flush()
    assert taken[-1].tolist() == [1] * 50


def test_tensors_reach_the_device_through_few_buffers(cuda: Cuda):
    lane = GpuLane(torch.device("cpu"))
    assert [lane.to_device(t).tolist() for t in numbers(8)] == [t.tolist() for t in numbers(8)]
    assert cuda.log.count("pinned") == BUFFERS


@pytest.fixture
def lane(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> GpuLane:
    """The lane that everything takes."""
    lane = GpuLane(torch.device("cpu"))
    monkeypatch.setattr(transfer, "is_host", lambda device: False)
    monkeypatch.setattr(transfer, "_lanes", {torch.device("cpu"): lane})
    return lane


@pytest.mark.usefixtures("lane")
def test_what_is_recorded_goes_over_the_lane(cuda: Cuda, tmp_path: Path):
    place = recorded(iter(numbers(7)), Batches(tmp_path / "b.bin"))
    assert [t.tolist() for t in place] == [t.tolist() for t in numbers(7)]
    assert cuda.log.count("pinned") == 2 * BUFFERS


@pytest.mark.usefixtures("lane")
def test_a_run_over_the_lane_gives_the_same_bits(dense: Path, expected: dict[str, str], tmp_path: Path):
    convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    assert checksums(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("limit", "sent", "read"), [(0, 107_520, 241_664), (20_000, 58_368, 101_376), (1 << 30, 20_480, 0)]
)
def test_what_fits_stays_on_the_gpu_and_gives_the_same_bits(
    limit: int, sent: int, read: int, lane: GpuLane, dense: Path, expected: dict[str, str], tmp_path: Path, monkeypatch
):
    seen = {"to_host": 0, "to_device": 0}

    def counting(way: str) -> Callable[..., Any]:
        real = getattr(lane, way)

        def copy(tensor: Tensor, *args: Any) -> Any:
            seen[way] += tensor.nbytes
            return real(tensor, *args)

        return copy

    for way in seen:
        monkeypatch.setattr(lane, way, counting(way))
    monkeypatch.setattr(in_folder, "room_on", lambda *_: batches.Room(limit))
    convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    assert checksums(tmp_path / "out") == expected
    assert seen == {"to_host": sent, "to_device": read}  # with room for all: what a killed run goes on from, once


@pytest.mark.usefixtures("lane")
def test_what_stays_on_the_gpu_is_in_the_folder_as_well(tmp_path: Path):
    store = FolderStore(tmp_path, 2, room=batches.Room(3 * 24 + 1))
    with store.scratch(0) as record:
        place = recorded(iter(numbers(5)), record())
        store.put_hidden(1, "dense", place)
    assert store.hidden(1, "dense") is place and isinstance(place, Batches) and place.held == 3 * 24
    found = FolderStore(tmp_path, 2).hidden(1, "dense")
    assert found is not None and [t.tolist() for t in found] == [t.tolist() for t in numbers(5)]
    with store.claim() as number:
        assert number == 0
    assert store.hidden(1, "dense") is not place  # another worker may have that layer


@dataclass(eq=False)
class Holding:
    """What holds tensors."""

    held: int


def test_room_is_what_a_run_leaves_free_by_its_formula(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    one: Any
    other: Any
    room, one, other = batches.room_on("cuda", 500), Holding(300), Holding(0)
    assert room.has(50, one) and room.has(50, other) and not room.has(200, other)
    del one
    assert room.has(200, other) and not batches.room_on("cpu", 0).has(0, other)


def test_after_an_error_nothing_more_is_taken(lane: GpuLane):
    taken = list[Tensor]()
    with pytest.raises(KeyboardInterrupt), sending():
        for tensor in numbers(BUFFERS):
            lane.to_host(tensor, taken.append)
        raise KeyboardInterrupt
    with sending():
        lane.to_host(torch.ones(2), lambda host: taken.append(host.clone()))
    assert [t.tolist() for t in taken] == [[1, 1]]


def test_the_host_has_no_lane(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.ones(3)
    assert type(lane_to("cpu")) is Lane and lane_to("cpu").to_device(tensor) is tensor
    monkeypatch.setattr(transfer, "GpuLane", str)
    monkeypatch.setattr(transfer, "_lanes", {})
    assert lane_to("cuda:1") is lane_to("cuda:1") == "cuda:1"


def test_what_torch_keeps_of_a_gpu_is_given_back_before_workers_begin(monkeypatch: pytest.MonkeyPatch):
    log = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty_cache"))

    def worker(job: Any, device: str) -> Any:
        log.append(device)
        return SimpleNamespace(stop=lambda: None)

    monkeypatch.setattr(executors, "Worker", worker)
    store: Any = SimpleNamespace(count=1, is_finished=lambda _: True)
    executors.Pool(("cuda:0", "cuda:1")).run(None, None, store, lambda _: None)  # pyright: ignore[reportArgumentType]
    assert log == ["empty_cache", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(("device", "current"), [("cuda:3", [3]), ("cuda", []), ("cpu", [])])
def test_a_process_computes_on_its_own_gpu(device: str, current: list[int], monkeypatch: pytest.MonkeyPatch):
    chosen = list[int]()
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    memory.use_gpu(device)
    assert chosen == current


@pytest.mark.parametrize(("backends", "met"), [("cpu:gloo,cuda:nccl", ["cpu", "meta"]), ("cuda:nccl", ["meta"])])
def test_ranks_meet_on_the_cpu_before_gpus_add_up(backends: str, met: list[str], monkeypatch: pytest.MonkeyPatch):
    seen = list[str]()
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: seen.append(tensor.device.type))
    ProcessGroup(0, 2).all_reduce(torch.ones(3, device="meta"))
    assert seen == met


def test_a_run_out_of_memory_says_what_it_needs_and_what_needs_less(monkeypatch: pytest.MonkeyPatch):
    def run(_: InMemory) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(InMemory, "run", run)
    with pytest.raises(errors.PruningError, match=r"CUDA out of memory\. Tried to allocate 20 GiB\. Free") as raised:
        convexprune.prune(num_calibration_samples=2)
    assert "By its formula this run needs" in str(raised.value)
    assert "With other settings: --error-correction 0 " in str(raised.value)


def test_advice_that_fails_hides_no_error():
    def advice() -> str:
        raise MemoryError

    with pytest.raises(errors.PruningError, match="Memory ran out: MemoryError"), memory.within_memory(advice):
        raise MemoryError
