"""Time functions in turns, so that all meet the same noise, and measure the memory of a part of a run."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

LEAST, MOST = 2, 200  # rounds; few, so that a model with slow formats takes about a minute
LATE = 3  # times the seconds: then one round is enough


@dataclass(frozen=True)
class Timing:
    what: str  # "prefill" or "decode"
    batch: int
    format: str
    milliseconds: float
    over_dense: float  # the median of time over the dense format's time in the same round
    middle_half: tuple[float, float]
    nbytes: int  # to read
    rounds: int  # of two or less the quartiles say little
    tokens_per_second: float

    def cells(self) -> list[str]:
        lower, upper = self.middle_half
        figures = f"{self.tokens_per_second:,.1f}", f"{self.over_dense:.2f}", f"{lower:.2f} to {upper:.2f}"
        return [self.what, str(self.batch), self.format, *figures, str(self.rounds), f"{self.nbytes / 1e6:,.1f}"]

    @property
    def verdict(self) -> str:
        """Return the speed relative to dense, if the noise allows a statement."""
        lower, upper = self.middle_half
        if lower <= 1 <= upper:
            return f"batch {self.batch} as fast, as far as the noise lets one see"
        ratio, once = self.over_dense, " (timed once)" if self.rounds == 1 else ""
        return f"batch {self.batch} {max(ratio, 1 / ratio):.2f} times as {'slow' if ratio > 1 else 'fast'}{once}"


def time_in_turns(
    runs: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    often: Callable[[Any], int] = lambda _: 1,
) -> dict[str, list[float]]:
    """Return seconds of every run, divided by `often` of its result, an entry for a round.

    The first round prepares. It counts only if it takes all the seconds: preparation is little beside so long a round.
    No further round begins after so many seconds if enough rounds count; after three times as many with a single round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    start, counted = time.perf_counter(), 0
    for number in range(MOST):
        took = dict[str, float]()
        for name, run in runs.items():
            wait()
            began = time.perf_counter()
            made = run()
            wait()
            took[name] = (time.perf_counter() - began) / often(made)
        spent = time.perf_counter() - start
        if number == 0 and spent <= seconds:
            continue
        for name, each in took.items():
            times[name].append(each)
        counted += 1
        if spent > (seconds if counted >= LEAST else LATE * seconds):
            break
    return times


def timing(
    what: str, batch: int, name: str, times: Mapping[str, Sequence[float]], dense: str, nbytes: int, tokens: int
) -> Timing:
    """Summarise the rounds' times by median and quartiles; `tokens` are those of a run."""
    ratios = [t / d for t, d in zip(times[name], times[dense], strict=True)]
    lower, middle, upper = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    seconds = median(times[name])
    return Timing(what, batch, name, 1e3 * seconds, middle, (lower, upper), nbytes, len(ratios), tokens / seconds)


STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """The largest number of bytes held inside the block, and its growth; None where nobody counts."""

    total: int | None = None
    more: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    peak, cuda, before = Peak(), device.type == "cuda", 0
    countable = cuda or os.access(REFERENCES, os.W_OK)
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
