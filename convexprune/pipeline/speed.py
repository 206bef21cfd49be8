"""How fast a device multiplies matrices, and what that makes of a run's arithmetic: an estimate of its time."""

import time
from dataclasses import dataclass
from math import inf

import torch

from convexprune.pipeline.cost import Method, Operations

SECONDS = 0.25  # that a matrix product is timed for, in each of two dtypes
WIDTH, WIDTH_ON_GPU = 1024, 8192  # of the product that is timed, which has to be long beside what begins it


@dataclass(frozen=True)
class Speed:
    """Operations a second of matrix products: in float32, and in the model's dtype."""

    single: float
    forward: float


def seconds(work: Operations, speed: Speed, method: Method) -> dict[str, float]:
    """An estimate by phase, without reading and writing."""
    return {
        "forward": work.forward / speed.forward,
        "gram": work.gram / speed.single,
        "solve": method.overhead * work.solve / speed.single,
    }


def measured_speed(device: torch.device | str, dtype: torch.dtype) -> Speed:
    """Time a product in float32 and one in the model's dtype, about half a second in all."""
    single = _rate(device, torch.float32)
    return Speed(single, single if dtype == torch.float32 else _rate(device, dtype))


def _rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """The best of the repeats, which is what the device can do when nobody else uses it."""
    width = WIDTH if torch.device(device).type == "cpu" else WIDTH_ON_GPU
    a = torch.full((width, width), 0.5, dtype=dtype, device=device)
    best, end = inf, time.perf_counter() + SECONDS
    while time.perf_counter() < end or best == inf:
        began = time.perf_counter()
        float((a @ a)[0, 0])  # which waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * width**3 / best
