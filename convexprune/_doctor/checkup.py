"""`doctor`: every check in turn, and the verdict."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._device.machine import default_device, processor, versions
from convexprune._device.memory import release_unused
from convexprune._device.switches import pinned
from convexprune._doctor.answers import Check, Measurement, Sizes, checks_of_answers
from convexprune._doctor.runs import checks_of_runs
from convexprune._progress import begin
from convexprune._schema.functions import CHECKS, DOCTOR
from convexprune._schema.parameters import documented


@dataclass(frozen=True)
class Row:
    check: str
    case: str
    measured: Measurement
    seconds: float

    @classmethod
    def of(cls, check: Check) -> "Row":
        """Run a check. An error becomes the result, so that the next check still runs."""
        began = time.perf_counter()
        try:
            measured = check.measure()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            measured = Measurement(f"{type(error).__name__}: {lines[0][:300]}", {}, False)
        release_unused()
        return cls(check.kind, check.case, measured, time.perf_counter() - began)

    def to_json(self) -> dict[str, Any]:
        return {"check": self.check, "case": self.case, "seconds": self.seconds} | self.measured._asdict()


@dataclass(frozen=True)
class Checkup:
    device: str
    environment: dict[str, str]  # versions, and settings that decide the order of sums
    rows: list[Row]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.measured.passed is False]

    def tables(self) -> Iterator[Table]:
        table, before = Table("check", "of", "", "measured", box=SIMPLE_HEAD, title=f"Doctor on {self.device}"), ""
        for row in self.rows:
            mark = {True: "passed", False: "FAILED", None: ""}[row.measured.passed]
            table.add_row("" if row.check == before else row.check, row.case, mark, row.measured.said)
            before = row.check
        yield table

    def verdict(self) -> Iterator[str]:
        """Yield sentences: the environment, the failures, and the fitness of the machine."""
        yield ", ".join(f"{name} {value}" for name, value in self.environment.items())
        for row in self.failed:
            yield f"Failed: {row.check}, {row.case}: {row.measured.said}."
        passed, seconds = len(self.rows) - len(self.failed), sum(row.seconds for row in self.rows)
        yield f"{passed} of {len(self.rows)} checks passed on {self.device}, in {seconds:.0f} s."

    def to_json(self) -> dict[str, Any]:
        facts = {"device": self.device, "environment": self.environment, "verdict": list(self.verdict())}
        return facts | {"passed": not self.failed, "rows": [row.to_json() for row in self.rows]}


@pinned()
@documented(DOCTOR)
def doctor(**settings: Any) -> Checkup:
    """Measure the machine and compare with the needs of a run. A failure becomes a row, and later checks still run."""
    asked, shared = DOCTOR.read(settings)
    device = default_device(shared.get("device", "auto"))
    sizes, rows = Sizes.on(device), []
    with TemporaryDirectory() as folder:
        checks = chain(checks_of_answers(sizes), checks_of_runs(sizes, Path(folder)))
        chosen = [check for check in checks if check.kind in (asked.checks or CHECKS)]
        step = begin("checking", len(chosen))
        for check in chosen:
            rows.append(Row.of(check))
            step(f"{check.kind}, {check.case}")
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    return Checkup(name, versions() | processor(device), rows)
