"""Perplexity, layer error, gap, time and memory of several methods, in one run on the same tokens.

python benchmarks/methods.py MODEL --dataset valid.txt --eval-text test.txt --output results.json
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

import convexprune
from convexprune.adapters import load, text_windows
from convexprune.validation import perplexity

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "fistapruner": {"preset": "fistapruner"},
    "fista": {"solver": "fista"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", default="self")
    parser.add_argument("--eval-text", required=True, nargs="+")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--patterns", default="unstructured,2:4")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--correction", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    dense = load(args.model, device="cpu", dtype=torch.float32)
    texts = {Path(t).stem: text_windows(Path(t), dense, args.length)[: args.windows] for t in args.eval_text}
    rows = [{"pattern": "-", "method": "dense"} | {name: perplexity(dense.model, w).value for name, w in texts.items()}]
    print(rows[0], flush=True)
    del dense
    for pattern in args.patterns.split(","):
        for name in args.methods.split(","):
            began = time.perf_counter()
            result = convexprune.prune(
                args.model, pattern=pattern, dataset=args.dataset, num_calibration_samples=args.samples,
                max_seq_length=args.length, error_correction=args.correction, dtype="float32", **METHODS[name],
            )  # fmt: skip
            seconds = time.perf_counter() - began
            report = result.report
            exact = all(o.zeros == o.expected_zeros for o in report.operators)
            errors = torch.tensor([o.relative_error for o in report.operators])
            row = {"pattern": pattern, "method": name}
            row |= {text: perplexity(result.model, windows).value for text, windows in texts.items()}
            row |= {
                "mean_error": float(errors.mean()),
                "largest_gap": report.largest_gap,
                "largest_path_gap": max((o.largest_gap or 0 for o in report.operators), default=0),
                "products": sum(o.products for o in report.operators),
                "exact_counts": exact,
                "operators": len(report.operators),
                "seconds": seconds,
                "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
            rows.append(row)
            print(row, flush=True)
            if args.output:
                args.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
