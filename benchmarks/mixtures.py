"""Calibration texts and mixtures of them: divergence from dense on several kinds of text.

    python benchmarks/mixtures.py MODEL --datasets wiki.txt self wiki.txt:0.5,self:0.5 --eval-text TEXT [TEXT ...]

MODEL is a folder, or `bundled`. Each dataset is one of `convexprune.prune`, each TEXT a file, python-docs or licences. KL is in
nats a token. The mean is geometric, over the texts, relative to the first dataset.
"""

import argparse
import time
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from imatrix import divergence, spread

import convexprune
from convexprune.adapters import EMBEDDED, load

WAYS: dict[str, dict[str, Any]] = {
    "half": {"sparsity": 0.5},
    "2:4": {"sparsity": 0.5, "pattern": "2:4"},
    "sparsegpt": {"sparsity": 0.5, "method": "sparsegpt"},
    "int4": {"sparsity": 0, "quantize": "int4"},
    "gptq": {"sparsity": 0, "quantize": "int4", "quantizer": "gptq"},
}


def main() -> None:
    """Print the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--eval-text", nargs="+", required=True)
    parser.add_argument("--ways", nargs="+", default=["half", "int4"], choices=WAYS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=16, help="of each text to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    source = EMBEDDED if asked.model == "bundled" else asked.model
    dense = load(source, device="cpu", dtype=torch.float32)
    texts = {text: spread(text, dense, asked.length, asked.windows) for text in asked.eval_text}
    print(f"| | calibrated on | KL: {' / '.join(Path(text).stem for text in texts)} | mean | s |")
    print("|---|---|---|---|---|")
    shared: dict[str, Any] = {"num_calibration_samples": asked.samples, "max_seq_length": asked.length}
    shared |= {"held_out_samples": 0, "evaluation": None, "dtype": "float32", "seed": asked.seed}
    for way in asked.ways:
        first: list[float] = []
        for dataset in asked.datasets:
            began = time.perf_counter()
            result = convexprune.prune(str(source), dataset=dataset, **shared | WAYS[way])
            seconds = time.perf_counter() - began
            found = [divergence(dense.model, result.model, windows) for windows in texts.values()]
            first = first or found
            mean = exp(sum(log(a / b) for a, b in zip(found, first, strict=True)) / len(found))
            parts = ", ".join(Path(part).name for part in dataset.split(","))
            print(
                f"| {way} | {parts} | {' / '.join(f'{v:.4f}' for v in found)} | {mean:.3f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
