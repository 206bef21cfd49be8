"""The rate of matrix products on a device, and an estimate of a run's time."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch

from convexprune._device.products import widened
from convexprune._runs.cost import Operations
from convexprune._runs.sizes import Method

SECONDS = 0.1  # that a matrix product is timed for, each time
TIMES, PAUSE = 4, 0.1  # in each of two dtypes, with so many seconds between, in which whoever else works may pause
WIDTH, WIDTH_ON_GPU = 1024, 8192  # of the product that is timed, which has to be long beside what begins it


@dataclass(frozen=True)
class Speed:
    single: float  # in float32
    forward: float


def seconds(work: Operations, speed: Speed, method: Method) -> dict[str, float]:
    """An estimate of the time by phase, without reading and writing."""
    return {
        "forward": work.forward / speed.forward,
        "gram": work.gram / speed.single,
        "solve": (method.overhead * work.solve + work.judge) / speed.single,
    }


def measured_speed(device: torch.device | str, dtype: torch.dtype) -> Speed:
    """Time a product in float32 and a product in the model's dtype, about a second in all."""
    single = _rate(device, torch.float32)
    return Speed(single, single if dtype == torch.float32 else _rate(device, dtype))


def _rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the best rate of all repeats, the nearest to the rate of an idle device."""
    width = WIDTH if torch.device(device).type == "cpu" else WIDTH_ON_GPU
    a = torch.full((width, width), 0.5, dtype=dtype, device=device)
    with widened(a.device, dtype):  # as a model's are
        return 2 * width**3 / _best(lambda: float((a @ a)[0, 0]))  # which waits for the device


def _best(run: Callable[[], object]) -> float:
    best = inf
    for number in range(TIMES):
        time.sleep(PAUSE if number else 0)
        end = time.perf_counter() + SECONDS
        while True:
            began = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - began)
            if time.perf_counter() >= end:
                break
    return best


def load() -> str:
    """Describe the present load of this machine."""
    if not hasattr(os, "getloadavg"):  # on Windows
        return "at its present load"
    return f"at its present load ({os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)"
