"""A check: what it measured, and whether that is as it has to be."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Bed:
    """Where it is checked, and how large the things are that it is checked on.

    Args:
        square: the width of the products that are timed.
        widths: of the problems whose iterations are timed.
        round_width: the widest of them whose rounds are timed too: each envelope costs its cube.
        matrix: the shape of a weight that is masked, [m n].
        group: the shape of the problem that every method solves, [m n].
        copied: bytes that are copied between host and device.
        hidden: the width of the two-layer LLaMA.
        length: tokens of a window for it.
        seconds: after which no further round of a timing begins, if there were five.
        experts: how many problems are solved side by side, and the shape of each.
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
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @classmethod
    def of(cls, device: str) -> "Bed":
        """What fits a device: a GPU of 16 GiB or more in two minutes, a CPU in twenty seconds."""
        if device.startswith("cuda"):
            return cls(device)
        return cls(device, 512, (128, 256, 576), 256, 64, (256, 768), (48, 192), 1 << 22, 64, 64, 0.0, (3, 24, 96))


@dataclass(frozen=True)
class Found:
    """What was measured.

    Args:
        passed: whether it is as it has to be; None: there is nothing to hold it against.
        advice: what to do if it is not.
    """

    said: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    passed: bool | None = None
    advice: str = ""


@dataclass(frozen=True)
class Row:
    """A check that was made.

    Args:
        found: what was measured; if it could not be, the error.
        seconds: that it took.
    """

    check: str
    case: str
    found: Found
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether it is not as it has to be."""
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
        """Make it; an error is its result, so that the others are made too."""
        began = time.perf_counter()
        try:
            found = self.measure()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            found = Found(f"{type(error).__name__}: {lines[0][:300]}", passed=False)
        _free()
        return Row(self.check, self.name, found, time.perf_counter() - began)


def _free() -> None:
    """Give back what a check held of a GPU, for the next one."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def alike(first: Mapping[str, Any], second: Mapping[str, Any], what: str) -> Found:
    """Whether two results are the same."""
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    said = f"{len(first)} {what}, {len(names)} differ" + (f": {', '.join(names[:3])}" if names else "")
    return Found(said, {"differ": len(names)}, bool(first) and not names)
