"""What a GPU is asked for, and in which order, by a fake that computes on the CPU."""

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
from convexprune._api import pruning
from convexprune._api.pruning import InMemory
from convexprune._device import memory
from convexprune._layerwise.context import recorded
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.processes import ProcessGroup
from convexprune._runs import executors
from convexprune._storage import batches
from convexprune._storage.batches import Batches


def numbers(count: int) -> list[Tensor]:
    return [torch.full((2, 3), float(i)) for i in range(count)]


@pytest.mark.parametrize(
    ("limit", "sent", "read"), [(0, 107_520, 241_664), (20_000, 58_368, 101_376), (1 << 30, 20_480, 0)]
)
def test_what_fits_stays_on_the_gpu_and_gives_the_same_bits(
    limit: int, sent: int, read: int, dense: Path, expected: dict[str, str], tmp_path: Path, monkeypatch
):
    seen = {"written": 0, "read": 0}
    write, found = batches.write, Batches.__getitem__

    def counting(file: Any, data: memoryview) -> None:
        seen["written"] += data.nbytes
        write(file, data)

    def counted(place: Batches, index: Any) -> Any:
        tensors = found(place, index)
        if isinstance(index, int) and index % len(place) >= len(place._resident):
            seen["read"] += tensors.nbytes  # pyright: ignore[reportAttributeAccessIssue]
        return tensors

    monkeypatch.setattr(batches, "write", counting)
    monkeypatch.setattr(Batches, "__getitem__", counted)
    monkeypatch.setattr(pruning, "room_on", lambda *_: batches.Room(limit))
    convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    assert checksums(tmp_path / "out") == expected
    assert seen == {"written": sent, "read": read}  # with room for all: what a killed run goes on from, once


def test_what_is_read_from_the_file_is_pinned_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pinned = list[Tensor]()
    monkeypatch.setattr(batches, "is_host", lambda device: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    place = recorded(iter(numbers(4)), Batches(tmp_path / "b.bin", room=batches.Room(24 + 1)))
    assert [t.tolist() for t in place] == [t.tolist() for t in numbers(4)]
    assert [t.tolist() for t in pinned] == [t.tolist() for t in numbers(4)[1:]]  # the first has never left the card


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


def test_what_torch_keeps_of_a_gpu_is_given_back_before_workers_begin(monkeypatch: pytest.MonkeyPatch):
    log = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty_cache"))

    def worker(job: Any, device: str) -> Any:
        log.append(device)
        return SimpleNamespace(stop=lambda: None)

    monkeypatch.setattr(executors, "Worker", worker)
    store: Any = SimpleNamespace(count=1, is_finished=lambda _: True)
    executors.Pool(devices=("cuda:0", "cuda:1")).run(None, None, store, lambda _: None)  # pyright: ignore[reportArgumentType]
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
