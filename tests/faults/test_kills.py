"""Each command that makes an output is killed at random moments, and given again, ends as one that was left in peace.

Killed, it leaves nothing at the output, or the whole result. The seeds are fixed; the clock is the machine's.
The slow test prints how many there were (`pytest -n0 -m slow -s tests/faults/test_kills.py`).
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import killed
from transformers import LlamaConfig, LlamaForCausalLM

from convexprune import __main__
from convexprune._rendering.page import page
from convexprune.report import Report

PRUNE = "prune {sources}/dense --dataset {sources}/text.txt --nsamples 4 --seqlen 32 --threads 1 -o {out}"
COMMANDS: dict[str, str] = {
    "prune": f"{PRUNE} --sparsity 0.5",
    "prune, channels": f"{PRUNE} --pattern channels:8 --sparsity 0.25",
    "prune, int4": f"{PRUNE} --sparsity 0 --quantize int4 --group-size 32",
    "prune, 3 bits": f"{PRUNE} --sparsity 0 --bits 3",
    "prune, iq4_nl": f"{PRUNE} --sparsity 0 --quantize iq4_nl",
    "prune, pack": f"{PRUNE} --sparsity 0.5 --method wanda --pack",
    "pack": "pack {sources}/run {out}",
    "unpack": "unpack {sources}/pack {out}",
    "export": "export {sources}/int4 {out}",
    "export, gguf": "export {sources}/int4 {out} --format gguf",
    "permute": "permute {sources}/dense --dataset {sources}/text.txt --nsamples 4 --seqlen 32 -o {out}",
}
KILLS = 8  # of each command
LONGEST = 1 << 12  # bytes of a marker and a lock, which are left if the moment was the first or the last


class Trial:
    """One command, always with the same output, in processes of which each says on stderr how it went."""

    def __init__(self, command: str, sources: Path, folder: Path) -> None:
        self.here, self.said = folder / "here", folder / "stderr"
        self.out = self.here / "out"
        self.words = COMMANDS[command].format(sources=sources, out=self.out).split()
        self.again = [*self.words, "--resume"] if self.words[0] == "prune" else self.words

    def run(self, words: list[str], after: float | None = None) -> int:
        """The exit status of the command line in a process of its own, killed after so many seconds."""

        def line() -> None:
            for stream in (1, 2):
                os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.argv = ["convexprune", *words]
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
            sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # pyright: ignore[reportAttributeAccessIssue]
            try:
                __main__.run()
            except SystemExit as ended:
                sys.stderr.flush()
                os._exit(int(ended.code or 0))

        status = killed(line, after)
        assert "Traceback" not in self.said.read_text(), self.said.read_text()
        return status

    def clear(self) -> None:
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir()

    def peace(self) -> tuple[float, dict[str, Any]]:
        """The fewest seconds, and the result, of the command left in peace."""
        seconds = inf
        for _ in range(3):
            self.clear()
            start = time.monotonic()
            assert self.run(self.words) == 0, self.said.read_text()
            seconds = min(seconds, time.monotonic() - start)
        assert [path.name for path in self.here.iterdir()] == ["out"]
        return seconds, found(self.out)

    def end(self, after: float, expected: dict[str, Any]) -> str:
        """Kill the command, look at what is there, give it again, and look at that; empty if it was not killed."""
        self.clear()
        self.said.unlink()
        if self.run(self.words, after) != -signal.SIGKILL:
            return ""
        was_whole = self.out.exists()
        if was_whole:
            assert found(self.out) == expected
        status = self.run(self.again)
        said = self.said.read_text()
        if was_whole and self.again == self.words:
            assert status == 2 and " already" in said, said
        else:
            assert status == 0, said
        assert found(self.out) == expected
        left = [path for path in self.here.iterdir() if path != self.out]
        inside = [file for place in left for file in place.iterdir()]  # a file in place of a folder is an error
        assert sum(file.stat().st_size for file in inside) < LONGEST, inside
        return f"{'the whole result' if was_whole else 'nothing'} there; folders beside it in the end: {len(left)}"


def found(folder: Path) -> dict[str, Any]:
    """The checksum of each file, and of the report all that no clock and no memory has a part in."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()} if folder.is_dir() else {}
    found: dict[str, Any] = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    if "report.json" in files:
        text = files["report.json"].read_text()
        told = [{name: o[name] for name in ("name", "zeros", "relative_error")} for o in json.loads(text)["operators"]]
        found |= {"report.json": told}
    if "report.html" in files:
        assert files["report.html"].read_text() == page(Report.from_json(files["report.json"].read_text()))
        found |= {"report.html": None}
    return found or {"": hashlib.sha256(folder.read_bytes()).hexdigest()}


@pytest.fixture(scope="module")
def sources(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read: a model, a text, a run, one that is quantized, and a pack."""
    folder = tmp_path_factory.mktemp("sources")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "dense", max_shard_size="300KB")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(" ".join(f"The {i}th river ran {i * i} miles to the sea." for i in range(400)))
    for name, words in {"run": "prune", "int4": "prune, int4", "pack": "pack"}.items():
        trial = Trial(words, folder, folder)
        trial.clear()
        assert trial.run(trial.words) == 0, trial.said.read_text()
        trial.out.rename(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_that_is_given_again_ends_with_the_same_bytes(command: str, sources: Path, tmp_path: Path):
    trial = Trial(command, sources, tmp_path)
    seconds, expected = trial.peace()
    print(f"\n{command}: {seconds:.2f} s")
    draw, kills = random.Random(command), 0
    for _ in range(4 * KILLS):
        share = draw.random()
        end = trial.end(share * seconds, expected)
        print(f"  {share:.2f}: {end or 'was faster'}")
        kills += bool(end)
        seconds *= 1 if end else 0.9  # the machine was busier before
        if kills == KILLS:
            return
    pytest.fail(f"only {kills} of {4 * KILLS} were killed; the rest was faster")
