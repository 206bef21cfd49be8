"""Copies between host and GPU: through pinned buffers, on separate streams, while the GPU computes."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convexprune._device.capabilities import is_host

BUFFERS = 3  # of each direction: one is filled, one is copied, one is emptied
Take = Callable[[Tensor], None]


class Lane:
    """The way to a device that is the host: without copies.

    Sent tensors are taken on the host in the order of sending, at the latest at the end of `sending`. A taken tensor
    belongs to the taker only during the call.
    """

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor

    def to_host(self, tensor: Tensor, take: Take) -> None:
        take(tensor)


@dataclass
class Slot:
    """A pinned buffer with the event of its last copy."""

    buffer: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))  # grows on demand
    done: Any = None  # event of the last copy; None before the first copy

    def view(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int) -> Tensor:
        """The beginning of the buffer as a tensor; the last copy has to be done."""
        if len(self.buffer) < nbytes:
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self.buffer[:nbytes].view(dtype).view(shape)


class GpuLane(Lane):
    """The way to a GPU. The host goes on during copies, and waits if all buffers are in use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inwards, self._outwards = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._free = {False: deque(Slot() for _ in range(BUFFERS)), True: deque(Slot() for _ in range(BUFFERS))}
        self._sent: deque[tuple[Slot, Tensor, Take]] = deque()

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy as `Lane.to_device`. Later work of the GPU waits for the copy, earlier work does not."""
        slot = self._free[False][0]
        self._free[False].rotate(-1)
        if slot.done is not None:
            slot.done.synchronize()
        staged = slot.view(tensor.shape, tensor.dtype, tensor.nbytes)
        staged.copy_(tensor)
        slot.done = torch.cuda.Event()
        with torch.cuda.stream(self._inwards):
            there = staged.to(self._device, non_blocking=True)
            slot.done.record(self._inwards)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(slot.done)
        there.record_stream(current)  # its memory belongs to the other stream
        return there

    def to_host(self, tensor: Tensor, take: Take) -> None:
        """Copy as `Lane.to_host`. The tensor is taken when its buffer is needed again."""
        if not self._free[True]:
            self._take_first()
        slot, tensor = self._free[True].popleft(), tensor.clone()  # what is computed next may change it
        staged = slot.view(tensor.shape, tensor.dtype, tensor.nbytes)
        self._outwards.wait_stream(torch.cuda.current_stream(self._device))
        slot.done = torch.cuda.Event()
        with torch.cuda.stream(self._outwards):
            staged.copy_(tensor, non_blocking=True)
            slot.done.record(self._outwards)
        tensor.record_stream(self._outwards)  # else its memory could be used again before it is copied
        self._sent.append((slot, staged, take))

    def flush(self) -> None:
        """Wait until all that was sent to the host is taken."""
        while self._sent:
            self._take_first()

    def drop(self) -> None:
        for slot, _, _ in self._sent:
            slot.done.synchronize()
            self._free[True].append(slot)
        self._sent.clear()

    def _take_first(self) -> None:
        slot, staged, take = self._sent.popleft()
        slot.done.synchronize()
        self._free[True].append(slot)
        take(staged)


_HOST = Lane()
_lanes: dict[torch.device, GpuLane] = {}


@contextmanager
def sending() -> Iterator[None]:
    """Take all sent tensors on the host at the end, on all lanes; after an error take none."""
    try:
        yield
        for lane in _lanes.values():
            lane.flush()
    finally:
        for lane in _lanes.values():
            lane.drop()


def lane_to(device: torch.device | str) -> Lane:
    """Return the lane of a device. Lanes are shared."""
    device = torch.device(device)
    if is_host(device):
        return _HOST
    if device not in _lanes:
        _lanes[device] = GpuLane(device)
    return _lanes[device]
