"""The machine of a run: device, number of workers, versions, seconds."""

import hashlib
import os
import platform
import resource
import sys
import time
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.resources.abc import Traversable

import torch

from convexprune._device.capabilities import has_bfloat16, prefers_onednn
from convexprune._device.kernels import eager_because
from convexprune._device.switches import recorded, restored
from convexprune.errors import RecipeError

PACKAGES = ("convexprune", "torch", "transformers", "numpy", "scipy", "cvxpy")
SHOWING = (
    "_cli", "_container", "_doctor", "_rendering", "errors.py", "_progress", "report.py", "_runs/cost.py",
    "_runs/sizes.py", "adapters/_training.py", "adapters/_inspection/inspection.py", "adapters/_inspection/outline.py",
    "validation/_bench.py", "validation/_evaluate.py", "validation/_formats.py", "validation/_layer_problems.py",
    "validation/_results.py", "validation/_source.py", "validation/_texts.py", "validation/_timing.py",
    "validation/_verify.py",
)  # fmt: skip
"""Our code that shows, estimates or checks: no bit of a result depends on it. All other code is taken to compute."""


THREADS_PER_CORE = 8  # so many are still sensible, to go on with a run that began on a larger machine


def default_device(name: str | torch.device) -> str:
    """Return the name of an available device; "auto" is the GPU if there is one."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    name, here = str(name), ["cpu", *(["cuda", *gpus] if gpus else [])]
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name not in here:
        none = "" if gpus else f" torch {torch.__version__} sees no GPU."
        raise RecipeError(f"device={name!r} is not here. Known: auto, {', '.join(here)}.{none}")
    return name


def check_threads(threads: int | None) -> None:
    """Refuse more threads than 8 for each core; None passes."""
    cores = os.cpu_count() or 1
    if threads is not None and threads > THREADS_PER_CORE * cores:
        raise RecipeError(
            f"threads={threads}: this machine has {cores} cores, on which at most {THREADS_PER_CORE * cores} threads "
            "are started. Leave threads out to have as many as torch takes."
        )


def default_workers(device: str, threads: int | None) -> int:
    """Return the number of GPUs, or of workers with `threads` threads that the cores have room for."""
    if device.startswith("cuda"):
        return 1 if ":" in device else torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // (threads or 1))


def versions() -> dict[str, str]:
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


@cache
def _version(name: str) -> str:
    """Return the version of a package, which is read from files; extras may be absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def steps(device: torch.device | str) -> str:
    """Return the number format of products between certificates (`Quadratic.residual_after`) on a `device`."""
    return "bfloat16" if has_bfloat16(torch.device(device)) else "float32"


def processor(device: torch.device | str) -> dict[str, str]:
    """Return what decides the order of sums and the formats of products on a device: chip, libraries, switches."""
    device, gpu = torch.device(device), dict[str, str]()
    if device.type == "cuda":
        kernels = "op by op" if eager_because(device) else "fused"
        gpu = {"gpu": torch.cuda.get_device_name(device), "kernels": kernels}
    library = {"products": "oneDNN"} if prefers_onednn() else {}
    instructions = {"instructions": torch.backends.cpu.get_cpu_capability()}
    return {"steps": steps(device)} | instructions | library | gpu | recorded()


def installation(device: torch.device | str) -> dict[str, str]:
    """Return the checksum of our code, the processor and the versions that can change the bits of a result."""
    return {"code": _own_code()} | processor(device) | {name: _version(name) for name in ("torch", "transformers")}


def code(package: Traversable | None = None) -> str:
    """Return the sha256 of this package's code, without files that only show results (`SHOWING`)."""
    total = hashlib.sha256()
    for name, file in sorted(_modules(files("convexprune") if package is None else package)):
        total.update(name.encode() + file.read_bytes())
    return total.hexdigest()


_own_code = cache(code)  # files that changed since the process began do not count


def _modules(folder: Traversable, inside: str = "") -> list[tuple[str, Traversable]]:
    modules = []
    for child in folder.iterdir():
        name = inside + child.name
        if name not in SHOWING and child.is_dir():
            modules += _modules(child, f"{name}/")
        elif name not in SHOWING and name.endswith(".py"):
            modules.append((name, child))
    return modules


def peak_memory(device: torch.device | str, has_workers: bool = False) -> dict[str, int]:
    """Return peak bytes since the process began: its own, of the largest ended worker, and of torch on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = {"process": resource.RUSAGE_SELF} | ({"workers": resource.RUSAGE_CHILDREN} if has_workers else {})
    sizes = {name: resource.getrusage(kind).ru_maxrss * unit for name, kind in kinds.items()}
    if torch.device(device).type == "cuda":
        sizes["gpu"] = torch.cuda.max_memory_allocated(device)
    return sizes


class Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


threads = partial(restored, torch.get_num_threads, torch.set_num_threads)
"""Let torch compute on a number of threads: sums have the same bits only on equally many threads."""
