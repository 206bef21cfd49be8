"""Prune a two-layer LLaMA end to end: equal bits twice and after a kill, gaps, memory and time."""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from convexprune._api.calls import prune
from convexprune._api.result import PruneResult
from convexprune._doctor.answers import LARGEST_GAP
from convexprune._doctor.check import Bed, Case, Found, alike
from convexprune.adapters._inspection.inspection import Inspection, inspect
from convexprune.report import OperatorReport
from convexprune.validation._memory import Peak, peak_memory

OPERATORS = 7  # of a layer
SAMPLES = 4
SLACK = 128 << 20  # bytes that libraries take of a GPU (cuBLAS has its workspace there)
MEMORY = (0.5, 1.2)  # what is measured over what the formula says, where that is more than the slack


class TwoLayers:
    """The folder of a two-layer LLaMA, and its runs."""

    def __init__(self, bed: Bed, folder: Path) -> None:
        self.bed, self.folder = bed, folder

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of every run."""
        random = torch.Generator().manual_seed(0)
        return {
            "model": str(self.saved), "num_calibration_samples": SAMPLES, "batch_size": 2, "device": self.bed.device,
            "dataset": torch.randint(2, 500, (SAMPLES + 1, self.bed.length), generator=random),
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    @cached_property
    def saved(self) -> Path:
        """Folder of the dense model, with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden = self.bed.hidden
        config = LlamaConfig(
            vocab_size=512, hidden_size=hidden, intermediate_size=11 * hidden // 4 // 8 * 8, num_hidden_layers=2,
            num_attention_heads=8, max_position_embeddings=self.bed.length, dtype=torch.bfloat16,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(self.folder / "model")  # pyright: ignore[reportArgumentType]
        return self.folder / "model"

    @cached_property
    def measured(self) -> tuple[PruneResult, Peak, float]:
        """Return an undisturbed run, its peak memory and its seconds."""
        began = time.perf_counter()
        with peak_memory(torch.device(self.bed.device)) as peak:
            result = prune(**self.settings, output_dir=self.folder / "first")
        return result, peak, time.perf_counter() - began

    def run_once(self) -> None:
        """Make the first run unless there is one."""
        _ = self.measured

    @cached_property
    def predicted(self) -> Inspection:
        """Return the forecast of `inspect`."""
        asked = {k: v for k, v in self.settings.items() if k not in ("model", "dataset", "threads")}
        return inspect(self.saved, max_seq_length=self.bed.length, held_out_samples=1, **asked)

    def again(self, name: str, **more: Any) -> Found:
        """Prune once more."""
        self.run_once()
        prune(**self.settings, output_dir=self.folder / name, **more)
        return alike(_checksums(self.folder / "first"), _checksums(self.folder / name), "files of weights")

    def after_a_kill(self) -> Found:
        """Kill a run in the second layer, resume, and compare the bits."""
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_prune_and_die, args=(self.settings, self.folder / "killed"))
        process.start()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return Found(f"the run that was to be killed ended with {process.exitcode}", passed=False)
        return self.again("killed", resume=True)


def cases(bed: Bed, folder: Path) -> Iterator[Case]:
    """The checks of runs."""
    model = TwoLayers(bed, folder)
    yield Case("runs", "gaps", partial(gaps, model))
    yield Case("runs", "twice, the same bits", partial(model.again, "second"))
    yield Case("runs", "killed and resumed, the same bits", model.after_a_kill)
    if bed.on_gpu:
        yield Case("runs", "a pool, the same bits", partial(model.again, "pool", executor="pool"))
    yield Case("runs", "memory", partial(memory, model))
    yield Case("runs", "time", partial(seconds, model))


def gaps(model: TwoLayers) -> Found:
    """The largest duality gap of a run."""
    report = model.measured[0].report
    largest = report.largest_gap
    said = f"largest {largest:.1e}, {report.sparsity:.2%} zeros" if largest is not None else "no solve has a gap"
    return Found(said, {"gap": largest or 0.0}, largest is not None and largest <= LARGEST_GAP)


def memory(model: TwoLayers) -> Found:
    """Compare the peak memory with `inspect`. The limit holds on a GPU, where nothing else is counted."""
    peak, predicted = model.measured[1].more, model.predicted.needed
    if peak is None:
        return Found("nobody counts the memory of a process here")
    said = f"{peak / 2**20:,.0f} MiB at the peak, {predicted / 2**20:,.0f} MiB by the formula"
    least, most = MEMORY[0] * predicted - SLACK, MEMORY[1] * predicted + SLACK
    passed = least <= peak <= most if model.bed.on_gpu else None
    return Found(said, {"measured": peak, "predicted": predicted}, passed)


def seconds(model: TwoLayers) -> Found:
    """Compare the time with the estimate of `inspect`, which leaves out files and start-up."""
    measured, predicted = model.measured[2], sum(model.predicted.seconds.values())
    said = f"{measured:.1f} s, {measured / predicted:.1f} times the estimate of inspect"
    return Found(said, {"measured": measured, "predicted": predicted})


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def _prune_and_die(settings: dict[str, Any], folder: Path) -> None:
    """Prune, and be killed once the second layer is begun."""
    told: list[OperatorReport] = []

    def on_operator(report: OperatorReport) -> None:
        told.append(report)
        if len(told) > OPERATORS:
            os.kill(os.getpid(), signal.SIGKILL)

    prune(**settings, output_dir=folder, progress=lambda _: on_operator)
