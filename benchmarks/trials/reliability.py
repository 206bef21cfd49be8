"""Runs that are stopped, damaged or changed under way: never another result, never a traceback, never a loss."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from calls import TOKENS, error_of
from models import DOWN, EMBEDDING
from rows import Checks
from safetensors.torch import load_file, save_file
from torch import Tensor
from workshop import RUN, ran

import convexprune
from convexprune.errors import ConvexpruneError

rows = Checks("reliability", needs="m/llama m/llama2 m/deep t/ok.txt r/wanda r/sparsegpt")
OPERATOR = "model.layers.0.self_attn.q_proj.weight"
WANDA = f"prune m/llama {RUN} --method wanda --output out"


def checksums(folder: str = "out") -> dict[str, str]:
    """Of the weights in a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).glob("*.safetensors"))}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Write another tensor into the finished run in `out`."""
    path = Path("out/model.safetensors")
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path, {"format": "pt"})


def sparser(weight: Tensor) -> Tensor:
    """90 % zeros."""
    return weight * (weight.abs() > weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values)


TAMPERED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "zero": (OPERATOR, torch.zeros_like),
    "random": (OPERATOR, torch.randn_like),
    "sparser": (OPERATOR, sparser),
    "negated": (OPERATOR, lambda weight: -weight),
    "embedding": (EMBEDDING, torch.zeros_like),
    "norm": ("model.norm.weight", torch.zeros_like),
    "down": (DOWN, lambda weight: weight * 1.01),
}


@rows.row("`verify` finds that a tensor of the result is not what the run made ({}).", each=TAMPERED)
def verify_tampered(name: str) -> None:
    shutil.copytree("r/sparsegpt", "out")
    changed(*TAMPERED[name])
    status, said = ran("verify out --sample 1")
    assert "Traceback" not in said, said[-160:]
    assert status != 0, "passed"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "gone": Path.unlink,
    "flipped": flip,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@rows.row("--resume does not hand back a finished run whose weights are {}.", each=DAMAGE)
def handed_back(name: str) -> None:
    shutil.copytree("r/wanda", "out")
    before = checksums()
    DAMAGE[name](Path("out/model.safetensors"))
    status, said = ran(f"{WANDA} --resume")
    assert "Traceback" not in said, said[-160:]
    assert status == 2 or checksums() == before, "exit status 0, and the weights are as damaged as they were"


# The input changes while the run is on


def replace(path: Path) -> None:
    shutil.copy("m/llama2/model.safetensors", "in/new")
    Path("in/new").rename(path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(Path("m/llama2/model.safetensors").read_bytes())


MEANWHILE: dict[str, Callable[[Path], object]] = {
    "renamed": replace,
    "overwritten": overwrite,
    "truncated": truncate,
    "deleted": Path.unlink,
}


@rows.row("Weights that are {} while the run is on are noticed: an error of ours, or the undisturbed result.",
          each=MEANWHILE)  # fmt: skip
def input_changes(name: str) -> None:
    shutil.copytree("m/llama", "in")
    told: list[Any] = []

    def on_operator(report: Any) -> None:
        if not told:
            MEANWHILE[name](Path("in/model.safetensors"))
        told.append(report)

    try:
        convexprune.prune(
            "in", output_dir="out", method="wanda", on_progress=lambda e: e.report and on_operator(e.report), **TINY
        )
    except ConvexpruneError:
        return
    convexprune.prune("m/llama", output_dir="peace", method="wanda", **TINY)
    assert checksums() == checksums("peace"), "exit status 0, and the result is of two models"


TINY: dict[str, Any] = {"dataset": TOKENS, "num_calibration_samples": 4, "max_seq_length": 32, "bound_rows": 0}


# Stopped runs


def stopped(model: str = "m/llama", **settings: Any) -> None:
    """The folder `out` of a run by Wanda that was interrupted in its second layer."""
    told: list[Any] = []

    def on_operator(report: Any) -> None:
        told.append(report)
        if len(told) == 8:
            raise KeyboardInterrupt

    try:
        convexprune.prune(
            model,
            output_dir="out",
            method="wanda",
            on_progress=lambda e: e.report and on_operator(e.report),
            **(TINY | settings),
        )
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not stopped")


def resumed(model: str = "m/llama", **settings: Any) -> convexprune.PruneResult:
    """Go on with it."""
    return convexprune.prune(model, output_dir="out", method="wanda", resume=True, **(TINY | settings))


@rows.row("The instruction set belongs to the identity of a run.")
def instruction_set() -> None:
    stopped()
    capability = torch.backends.cpu.get_cpu_capability()
    assert capability.lower() in Path(".out.part/run.json").read_text().lower(), f"run.json does not name {capability}"


SELF: dict[str, Any] = {"dataset": "self", "evaluation": "self", "num_calibration_samples": 4}


@rows.row("A bit flipped in the sampled windows at {}: found, and the error names the file; or the same perplexity.",
          each=("0.1", "0.3", "0.5", "0.7", "0.9", "0.97"))  # fmt: skip
def windows_flipped(where: str) -> None:
    stopped(**SELF)
    file = Path(".out.part/work/tokens.safetensors")
    content = bytearray(file.read_bytes())
    content[int(float(where) * len(content)) // 8 * 8] ^= 4
    file.write_bytes(content)
    shutil.copytree("out", "damaged")
    shutil.rmtree("out")
    expected = convexprune.prune("m/llama", output_dir="out", method="wanda", **(TINY | SELF)).report.perplexity
    shutil.rmtree("out")
    shutil.move("damaged", "out")
    result: list[Any] = []
    said = error_of(lambda: result.append(resumed(**SELF)))
    if result:
        assert result[0].report.perplexity == expected, "another perplexity, and nothing is said"
    else:
        assert re.search("(?i)damaged|checksum|cut short", said), f"not told from difference: {said[:120]}"


@rows.row("run.json that is {}: damage is told from difference, and finished layers are not lost.",
          each=("flipped", "truncated", "gone", "edited"))  # fmt: skip
def run_json(name: str) -> None:
    stopped()
    file, layers = Path(".out.part/run.json"), {p.name for p in Path(".out.part/work/layers").iterdir()}
    if name == "edited":
        file.write_text(file.read_text().replace('"cpu"', '"cpt"'))
    elif name == "truncated":
        file.write_text(file.read_text()[:-40])
    else:
        DAMAGE[name](file)
    said = error_of(resumed)
    there = {p.name for p in Path(".out.part/work/layers").glob("*")} if Path(".out.part/work").exists() else set()
    finished = Path("out/model.safetensors").exists()
    assert said or finished, "neither an error nor a result"
    if said:
        assert layers <= there, "the finished layers are deleted"
        assert "then" not in said or "damaged" in said, f"damage is called a difference: {said[:120]}"
    else:
        assert name != "gone" or "redone" in said or not layers, "finished layers were deleted without a word"


@rows.row("The tokenizer belongs to the identity: removed before --resume, it is missed; or the result has it.")
def tokenizer_removed() -> None:
    shutil.copytree("m/llama", "in")
    stopped("in")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (Path("in") / file).unlink()
    said = error_of(lambda: resumed("in"))
    assert said or Path("out/tokenizer.json").exists(), "a result without its tokenizer, and nothing is said"
