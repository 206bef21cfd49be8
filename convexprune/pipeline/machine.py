"""Where a run happens: its device, how many workers fit, the versions of what it depends on, and its seconds."""

import hashlib
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from convexprune.device import has_bfloat16

PACKAGES = ("convexprune", "torch", "transformers", "numpy", "scipy", "cvxpy")


def default_device(name: str) -> str:
    """The device of that name; "auto" is the GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_workers(device: str, threads: int | None) -> int:
    """One for each GPU, or as many as the cores have room for."""
    if device.startswith("cuda"):
        return 1 if ":" in device else torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // (threads or 1))


def versions() -> dict[str, str]:
    """Of the packages that a result depends on, and of Python."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def steps(device: torch.device | str) -> str:
    """The number format of products between certificates (`Quadratic.residual_after`), on which a result depends."""
    return "bfloat16" if has_bfloat16(torch.device(device)) else "float32"


def installation(device: torch.device | str) -> dict[str, str]:
    """What the bits of a result depend on that may be another elsewhere, or later: our code, torch, and so on."""
    return {"code": code(), "steps": steps(device)} | {name: version(name) for name in ("torch", "transformers")}


def code() -> str:
    """The checksum of this package's own code."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        total.update(path.read_bytes())
    return total.hexdigest()


class Clock:
    """Seconds of each phase of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add what has passed since the last lap to the phase `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
