"""A check: the measurement, and the limit that decides."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Bed:
    """Device and sizes of the checks.

    Args:
        square: the width of the timed products.
        widths: widths of the problems whose iterations are timed.
        round_width: the widest problem whose rounds are timed; an envelope costs the cube of the width.
        matrix: the shape [m n] of the masked weight.
        group: the shape [m n] of the problem that every method solves.
        copied: bytes copied between host and device.
        hidden: the width of the two-layer LLaMA.
        length: tokens of a window of the LLaMA.
        seconds: no further round of a timing begins after so many seconds and five rounds.
        experts: the number of problems solved side by side, and their shape.
    """

    device: str
    square: int = 8192
    widths: tuple[int, ...] = (576, 1536, 4096, 8192, 11008, 28672)
    round_width: int = 8192
    rows: int = 2048
    matrix: tuple[int, int] = (4096, 11008)
    group: tuple[int, int] = (128, 4096)
    copied: int = 1 << 28
    hidden: int = 2048
    length: int = 2048
    seconds: float = 0.5
    experts: tuple[int, int, int] = (8, 768, 2048)

    @property
    def on_gpu(self) -> bool:
        """Return True on a GPU."""
        return self.device.startswith("cuda")

    @classmethod
    def of(cls, device: str) -> "Bed":
        """Return sizes for a device: a GPU of 16 GiB takes two minutes, a CPU twenty seconds."""
        if device.startswith("cuda"):
            return cls(device)
        return cls(device, 512, (128, 256, 576), 256, 64, (256, 768), (48, 192), 1 << 22, 64, 64, 0.0, (3, 24, 96))


@dataclass(frozen=True)
class Found:
    """A measurement.

    Args:
        passed: True within the limit; None without a limit.
        advice: the remedy after a failure.
    """

    said: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    passed: bool | None = None
    advice: str = ""


@dataclass(frozen=True)
class Row:
    """A finished check.

    Args:
        found: the measurement, or the error that prevented the measurement.
        seconds: duration of the check.
    """

    check: str
    case: str
    found: Found
    seconds: float

    @property
    def failed(self) -> bool:
        """Return True after an error or beyond the limit."""
        return self.found.passed is False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"check": self.check, "case": self.case, "seconds": self.seconds} | vars(self.found)


@dataclass(frozen=True)
class Case:
    """A check to make."""

    check: str
    name: str
    measure: Callable[[], Found]

    def row(self) -> Row:
        """Run the check. An error becomes the result, so that the next check still runs."""
        began = time.perf_counter()
        try:
            found = self.measure()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            found = Found(f"{type(error).__name__}: {lines[0][:300]}", passed=False)
        _free()
        return Row(self.check, self.name, found, time.perf_counter() - began)


def _free() -> None:
    """Release the GPU memory of the last check."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def alike(first: Mapping[str, Any], second: Mapping[str, Any], what: str) -> Found:
    """Compare two results bit by bit."""
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    said = f"{len(first)} {what}, {len(names)} differ" + (f": {', '.join(names[:3])}" if names else "")
    return Found(said, {"differ": len(names)}, bool(first) and not names)
