"""`doctor`: every check in turn, runs of a two-layer LLaMA among them, and the verdict."""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._api.calls import prune
from convexprune._device.machine import default_device, processor, versions
from convexprune._device.memory import release_unused
from convexprune._device.switches import pinned
from convexprune._doctor.answers import LARGEST_GAP, Check, Measurement, Sizes, checks_of_answers
from convexprune._progress import Event, begin
from convexprune._schema.functions import CHECKS, DOCTOR
from convexprune._schema.parameters import documented
from convexprune.adapters import inspect
from convexprune.report import Report


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


OPERATORS = 7  # of a layer
SAMPLES = 4
SLACK = 128 << 20  # bytes that libraries take of a GPU (cuBLAS has its workspace there)
MEMORY = (0.5, 1.2)  # measured bytes over the formula's, where that is more than the slack


class TwoLayers:
    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder

    @cached_property
    def settings(self) -> dict[str, Any]:
        random = torch.Generator().manual_seed(0)
        return {
            "model": str(self.saved), "num_calibration_samples": SAMPLES, "batch_size": 2, "device": self.sizes.device,
            "dataset": torch.randint(2, 500, (SAMPLES + 1, self.sizes.length), generator=random),
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    @cached_property
    def saved(self) -> Path:
        """Folder of the dense model, with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden = self.sizes.hidden
        config = LlamaConfig(
            vocab_size=512, hidden_size=hidden, intermediate_size=11 * hidden // 4 // 8 * 8, num_hidden_layers=2,
            num_attention_heads=8, max_position_embeddings=self.sizes.length, dtype=torch.bfloat16,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(self.folder / "model")  # pyright: ignore[reportArgumentType]
        return self.folder / "model"

    @cached_property
    def report(self) -> Report:
        """Report of an undisturbed run. Its peak of GPU memory counts from here."""
        if self.sizes.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.sizes.device)
        return prune(**self.settings, output_dir=self.folder / "first").report

    def again(self, name: str, **more: Any) -> Measurement:
        _ = self.report
        prune(**self.settings, output_dir=self.folder / name, **more)
        first, second = (_checksums(self.folder / run) for run in ("first", name))
        names = [file for file in {**first, **second} if first.get(file) != second.get(file)]
        said = f"{len(first)} files of weights, {len(names)} differ" + (f": {', '.join(names[:3])}" if names else "")
        return Measurement(said, {"differ": len(names)}, bool(first) and not names)

    def after_a_kill(self) -> Measurement:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_prune_and_die, args=(self.settings, self.folder / "killed"))
        process.start()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return Measurement(f"the run that was to be killed ended with {process.exitcode}", {}, False)
        return self.again("killed", resume=True)

    def gaps(self) -> Measurement:
        largest = self.report.largest_gap
        said = f"largest {largest:.1e}, {self.report.sparsity:.2%} zeros" if largest else "no solve has a gap"
        return Measurement(said, {"gap": largest or 0.0}, largest is not None and largest <= LARGEST_GAP)

    def memory(self) -> Measurement:
        asked = {k: v for k, v in self.settings.items() if k not in ("model", "dataset", "threads")}
        predicted = inspect(self.saved, max_seq_length=self.sizes.length, held_out_samples=1, **asked).needed
        peak = self.report.memory["gpu"]
        said = f"{peak / 2**20:,.0f} MiB at the peak, {predicted / 2**20:,.0f} MiB by the formula"
        least, most = MEMORY[0] * predicted - SLACK, MEMORY[1] * predicted + SLACK
        return Measurement(said, {"measured": peak, "predicted": predicted}, least <= peak <= most)


def checks_of_runs(sizes: Sizes, folder: Path) -> Iterator[Check]:
    model = TwoLayers(sizes, folder)
    if sizes.device.startswith("cuda"):
        yield Check("runs", "memory", model.memory)
        yield Check("runs", "a pool, the same bits", partial(model.again, "pool", executor="pool"))
    yield Check("runs", "gaps", model.gaps)
    yield Check("runs", "twice, the same bits", partial(model.again, "second"))
    yield Check("runs", "killed and resumed, the same bits", model.after_a_kill)


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def _prune_and_die(settings: dict[str, Any], folder: Path) -> None:

    def on_progress(event: Event) -> None:
        if event.report is not None and event.done > OPERATORS:
            os.kill(os.getpid(), signal.SIGKILL)

    prune(**settings, output_dir=folder, on_progress=on_progress)
