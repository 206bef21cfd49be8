"""What the benchmarks of whole layers and models share: seconds of each phase, the machine, tables and JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from convexprune import adapters
from convexprune._layerwise import context, pipeline, stages
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.statistics import CalibrationStatistics

# Who does what; none of them calls another.
PHASES: dict[str, list[tuple[Any, str]]] = {
    "forward": [(context, "observe"), (stages, "inputs_by_sample")],
    "Gram": [(CalibrationStatistics, "add")],
    "solve": [(pipeline, "run_steps")],
    "write": [(FolderStore, "finish"), (FolderStore, "put_hidden"), (adapters, "save_from_store")],
}


@contextmanager
def phases(device: str) -> Iterator[dict[str, float]]:
    """Seconds of each phase of what this process prunes inside the block, and of the whole block."""
    seconds = dict.fromkeys([*PHASES, "all"], 0.0)

    def timed(phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = _now(device)
            try:
                return work(*args, **kwargs)
            finally:
                seconds[phase] += _now(device) - began

        return run

    with ExitStack() as stack:
        for phase, places in PHASES.items():
            for place, name in places:
                stack.enter_context(patch.object(place, name, timed(phase, getattr(place, name))))
        began = _now(device)
        yield seconds
        seconds["all"] = _now(device) - began


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def machine(device: str) -> dict[str, Any]:
    """Where and with what the numbers were made, and how busy the machine was."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "convexprune")},
    }


def report(rows: Sequence[Mapping[str, Any]], device: str, output: Path | None, **more: Any) -> None:
    """Print the rows as a table, and write all of it as JSON."""
    where = machine(device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    for name, value in more.items():
        print(f"{name}: {value}")
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(_cell(row[name]) for name in names) + " |")
    if output is not None:
        output.write_text(json.dumps({"machine": where, "rows": list(rows)} | more, indent=2))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
