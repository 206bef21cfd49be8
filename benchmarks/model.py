"""A model end to end: seconds of forward passes, Gram matrices, solves and writing, and the peak of memory.

    python benchmarks/model.py SMOLLM2 --dataset wikitext2-valid.txt --samples 8 --length 1024

Beside it stands what `convexprune inspect` says of the same run: memory by formula, time as an estimate.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from phases import medians, phases, report

import convexprune
from convexprune.adapters._inspection.inspection import inspect
from convexprune.validation._timing import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", default="self")
    parser.add_argument("--methods", default="convex,sparsegpt")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for method in args.methods.split(","):
        recipe = {
            "method": method, "num_calibration_samples": args.samples, "max_seq_length": args.length,
            "held_out_samples": 1, "dtype": args.dtype,
        }  # fmt: skip
        runs = [run(args, recipe) for _ in range(args.repeats)]
        found = inspect(args.model, device=args.device, **recipe)
        needed = found.memory.all if args.device == "cpu" else found.memory.device
        said = {"inspect s": sum(found.seconds.values()), "inspect GiB": needed / 2**30}
        rows.append({"method": method, **medians(runs), **said})
        print(rows[-1], flush=True)
    report(rows, args.device, args.output, model=args.model, tokens=f"{args.samples} + 1 held out x {args.length}")


def run(args: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        peak_memory(torch.device(args.device)) as peak,
        phases(args.device) as seconds,
    ):
        convexprune.prune(
            args.model, dataset=args.dataset, device=args.device, output_dir=Path(folder) / "pruned", **recipe
        )
    return seconds | {"peak GiB": (peak.total or 0) / 2**30}


if __name__ == "__main__":
    main()
