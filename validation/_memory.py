"""The most memory that a part of a run has needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The largest number of bytes held inside the block, and its growth; None where nobody counts."""

    total: int | None = None
    more: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the memory of the block."""
    peak, cuda = Peak(), device.type == "cuda"
    countable = cuda or os.access(REFERENCES, os.W_OK)
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif countable:
        REFERENCES.write_text("5")  # the peak starts anew
        before = _kilobytes("VmRSS") * 1024
    yield peak
    if countable:
        peak.total = torch.cuda.max_memory_allocated(device) if cuda else _kilobytes("VmHWM") * 1024
        peak.more = max(0, peak.total - before)


def _kilobytes(name: str) -> int:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])
