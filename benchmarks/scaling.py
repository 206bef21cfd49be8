"""Time and peak memory of a run as layers, width, tokens and workers grow, and the exponents fitted to them.

    python benchmarks/scaling.py --width 256 --layers 2 --length 256 --samples 4 --method wanda

A LLaMA with random weights is written to the disk and pruned from there in processes of their own, whose peak memory is
measured; one size at a time is doubled. An exponent is the slope of a least-squares line through the logarithms: of the
seconds of pruning, and of the memory beyond what the imported libraries take. `said` is the peak by the formulas of
`convexprune inspect`, over the one measured.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from phases import report
from transformers import LlamaConfig, LlamaForCausalLM

from convexprune.adapters._inspection.inspection import inspect

AXES = ("layers", "width", "tokens", "workers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--doublings", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--method", default="convex")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(**args.measure)
        return
    base = {"layers": args.layers, "width": args.width, "tokens": args.samples * args.length, "workers": args.workers}
    rows, exponents = [], {}
    for axis in args.axes.split(","):
        sizes = [base | {axis: base[axis] << i} for i in range(args.doublings + 1)]
        found = [{"axis": axis, **size, **run(size, args)} for size in sizes]
        for quantity in ("seconds", "MiB beyond imports"):
            exponents[f"{axis}: {quantity}"] = round(
                exponent([r[axis] for r in found], [r[quantity] for r in found]), 2
            )
        rows += found
        print(found, flush=True)
    report(rows, args.device, args.output, method=args.method, length=args.length, exponents=exponents)


def run(size: dict[str, int], args: argparse.Namespace) -> dict[str, float]:
    """Medians over new processes on one model."""
    with tempfile.TemporaryDirectory() as folder:
        making = get_context("spawn").Process(target=build, args=(Path(folder) / "model", size, args.length))
        making.start()  # not here: a process starts with its parent's peak of memory
        making.join()
        samples = size["tokens"] // args.length
        measured = []
        for number in range(args.repeats):
            asked = {
                "folder": folder, "number": number, "samples": samples, "length": args.length, "method": args.method,
                "device": args.device, "workers": size["workers"],
            }  # fmt: skip
            command = [sys.executable, __file__, "--measure", json.dumps(asked)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
        found = inspect(
            Path(folder) / "model", method=args.method, num_calibration_samples=samples, max_seq_length=args.length,
            held_out_samples=1,
        )  # fmt: skip
    medians = {name: statistics.median(m[name] for m in measured) for name in measured[0]}
    needed = found.memory.all if args.device == "cpu" else found.memory.device
    return medians | {"said": needed / 2**20 / medians["peak MiB"]}


def measure(folder: str, number: int, samples: int, length: int, method: str, device: str, workers: int) -> None:
    """Prune in this process and the workers it starts; the peak is that of the largest of them."""
    import convexprune

    tokens = torch.randint(512, (samples + 1, length), generator=torch.Generator().manual_seed(1))
    imports = peak()
    result = convexprune.prune(
        Path(folder) / "model", method=method, dataset=tokens, num_calibration_samples=samples, held_out_samples=1,
        device=device, threads=1, output_dir=Path(folder) / f"pruned-{number}", workers=workers,
        executor="pool" if workers > 1 else "serial",
    )  # fmt: skip
    most = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else peak()
    beyond = most if device != "cpu" else most - imports
    seconds = result.report.seconds["prune"]
    print(json.dumps({"seconds": seconds, "peak MiB": most, "MiB beyond imports": beyond}))


def build(folder: Path, size: dict[str, int], length: int) -> None:
    torch.manual_seed(0)
    width = size["width"]
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=size["layers"],
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def exponent(sizes: list[Any], values: list[Any]) -> float:
    """b of value = a size^b, by least squares on logarithms."""
    x, y = [math.log(s) for s in sizes], [math.log(max(v, 1e-9)) for v in values]
    return statistics.linear_regression(x, y).slope if len(set(x)) > 1 else math.nan


def peak() -> float:
    """MiB."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) / 2**10


if __name__ == "__main__":
    main()
