"""Layer errors of the pruners on real layer problems (x* = x), relative to SparseGPT, on calibration and held-out tokens.

python benchmarks/layers.py MODEL --dataset valid.txt --held-out test.txt --operators model.layers.1.self_attn.q_proj,...
"""

import argparse
import json
import math
from pathlib import Path

import torch
from solver import watch

from convexprune import parse_pattern
from convexprune.adapters import calibration_tokens, load, text_windows
from convexprune.pruners import Convex, FISTAPruner, PruningProblem, SparseGPT, Wanda

PRUNERS = {
    "sparsegpt": SparseGPT(),
    "wanda": Wanda(),
    "fistapruner": FISTAPruner(),
    "convex": Convex(damping=1e-3),
    "convex, r = .03": Convex(damping=0.03),
    "convex, r = .1": Convex(damping=0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--held-out", required=True, type=Path)
    parser.add_argument("--operators", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = load(args.model, device="cpu", dtype=torch.float32)
    weights = {name: model.model.get_parameter(f"{name}.weight") for name in args.operators.split(",")}
    tokens = calibration_tokens(args.dataset, model, num_samples=args.samples, max_seq_length=args.length, seed=0)
    seen = watch(model, weights, tokens)
    held = watch(model, weights, text_windows(args.held_out, model, args.length)[20:32])
    rows = []
    for pattern in (parse_pattern("unstructured", 0.5), parse_pattern("unstructured", 0.7), parse_pattern("2:4")):
        errors: dict[str, list[tuple[float, float]]] = {name: [] for name in PRUNERS}
        for name, weight in weights.items():
            problem = PruningProblem(weight.double(), seen[name], pattern)
            unseen = PruningProblem(weight.double(), held[name], pattern)
            for method, pruner in PRUNERS.items():
                pruned = pruner.prune(problem).weight
                pair = [float(p.squared_error(pruned).sum() / p.energy.sum()) for p in (problem, unseen)]
                errors[method].append((pair[0], pair[1]))
        for method, pairs in errors.items():
            ratios = [
                [p / q for p, q in zip(a, b, strict=True)] for a, b in zip(pairs, errors["sparsegpt"], strict=True)
            ]
            row = {"pattern": str(pattern), "method": method, "calibration": mean([r[0] for r in ratios])}
            row |= {"held_out": mean([r[1] for r in ratios]), "by_operator": [round(r[0], 3) for r in ratios]}
            rows.append(row)
            print(row, flush=True)
            if args.output:
                args.output.write_text(json.dumps(rows, indent=2))


def mean(values: list[float]) -> float:
    """The geometric mean."""
    return round(math.exp(sum(map(math.log, values)) / len(values)), 4)


if __name__ == "__main__":
    main()
