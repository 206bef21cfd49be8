"""`doctor`: every check in turn, and the verdict."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from convexprune._device.machine import default_device, processor, versions
from convexprune._device.switches import pinned
from convexprune._doctor import answers, kernels, runs, speeds
from convexprune._doctor.check import Bed, Case, Row
from convexprune._progress import begin
from convexprune._schema.door import documented
from convexprune._schema.functions import DOCTOR
from convexprune._schema.measures import CHECKS


@dataclass(frozen=True)
class Checkup:
    """All finished checks.

    Args:
        environment: versions, and settings that decide the order of sums.
    """

    device: str
    environment: dict[str, str]
    rows: list[Row]

    @property
    def failed(self) -> list[Row]:
        """Return the failed checks."""
        return [row for row in self.rows if row.failed]

    def verdict(self) -> Iterator[str]:
        """Yield sentences: the failures, the remedies, and the fitness of the machine."""
        for row in self.failed:
            advice = f" {row.found.advice}" if row.found.advice else ""
            yield f"Failed: {row.check}, {row.case}: {row.found.said}.{advice}"
        judged = sum(row.found.passed is not None for row in self.rows)
        passed = judged - len(self.failed)
        yield f"{passed} of {judged} checks passed on {self.device}, in {sum(row.seconds for row in self.rows):.0f} s."

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        facts = {"device": self.device, "environment": self.environment, "verdict": list(self.verdict())}
        return facts | {"passed": not self.failed, "rows": [row.to_json() for row in self.rows]}


def all_cases(bed: Bed, folder: Path) -> Iterator[Case]:
    """Every check."""
    yield from kernels.cases(bed)
    yield from speeds.cases(bed)
    yield from answers.cases(bed)
    yield from runs.cases(bed, folder)


@pinned()
@documented(DOCTOR)
def doctor(**settings: Any) -> Checkup:
    """Measure the machine and compare with the needs of a run.

    A failure becomes a row. Later checks still run.
    """
    asked, shared = DOCTOR.read(settings)
    device = default_device(shared.get("device", "auto"))
    bed, rows = Bed.of(device), []
    with TemporaryDirectory() as folder:
        chosen = [each for each in all_cases(bed, Path(folder)) if each.check in (asked.checks or CHECKS)]
        step = begin("checking", len(chosen))
        for case in chosen:
            rows.append(case.row())
            step(f"{case.check}, {case.name}")
    name = torch.cuda.get_device_name(device) if bed.on_gpu else f"cpu, {torch.get_num_threads()} threads"
    return Checkup(name, versions() | processor(device), rows)
