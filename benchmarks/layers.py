"""Layer errors of all methods relative to SparseGPT, x* = x, on several operators of a real model.

    python benchmarks/layers.py MODEL --dataset valid.txt --held-out test.txt --windows 8,32 --output layers.json

One row for each number of calibration windows, pattern and method: the geometric means over the operators of the
calibration and of the held-out error over SparseGPT's, the calibration error of each operator, the matrix products of
the dearest operator, and the seconds of all. The last lines compare the held-out error of the default with that of
every published method, operator by operator. `--moments FILE` keeps the moments there and finds them on the next run.

`--brute-force` instead tries all supports of 20 random columns (24 rows, 10 kept a row, two draws an operator) and
prints the error of each method over the least.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from brute_force import excess
from solver import watch
from torch import Tensor

from convexprune import Moments, parse_pattern
from convexprune.adapters import load, text_windows
from convexprune.constraints import Unstructured
from convexprune.pruners import (
    ADMM,
    ALPS,
    AbstractPruner,
    Convex,
    FISTAPruner,
    LayerProblem,
    Refitted,
    SparseGPT,
    Wanda,
)
from convexprune.solvers import make_solver

OPERATORS = (
    "model.layers.1.self_attn.q_proj,model.layers.15.self_attn.q_proj,model.layers.29.self_attn.q_proj,"
    "model.layers.15.self_attn.o_proj,model.layers.15.mlp.gate_proj,model.layers.15.mlp.down_proj"
)
TEN = make_solver("cg", max_iterations=10)
ADMM_PATH = Convex.solver_for("admm")
PRUNERS: dict[str, AbstractPruner] = {
    "sparsegpt": SparseGPT(),
    "wanda": Wanda(),
    "fistapruner": FISTAPruner(),
    "alps": ALPS(),
    "sparsegpt + refit": Refitted(SparseGPT(), damping=0.0),
    "fistapruner + refit": Refitted(FISTAPruner(), damping=0.0),
    # The least damping: how well the calibration error is minimised.
    "admm, r = .001, 50 products": ADMM(damping=1e-3, iterations=30, refit=TEN),
    "admm, r = .001": ADMM(damping=1e-3),
    "admm, r = .001, 150 products": ADMM(damping=1e-3, iterations=95),
    "fista, r = .001, 50 products": Convex(damping=1e-3, rounds=26, refit=TEN),
    "fista, r = .001": Convex(damping=1e-3),
    "fista, r = .001, 150 products": Convex(damping=1e-3, rounds=96),
    "convex by admm, r = .001": Convex(damping=1e-3, solver=ADMM_PATH),
    # As they are used: damping by the sample's noise.
    "admm": ADMM(),
    "fista (default)": Convex(),
}
PUBLISHED = ("sparsegpt", "fistapruner", "alps")


@dataclass(frozen=True)
class Row:
    """One method on one operator: errors are relative to the dense output."""

    windows: int
    pattern: str
    method: str
    operator: str
    calibration: float
    held_out: float
    products: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True, type=Path)
    parser.add_argument("--held-out", required=True, type=Path)
    parser.add_argument("--operators", default=OPERATORS)
    parser.add_argument("--windows", default="8,32", help="calibration windows, the first of the text; ascending")
    parser.add_argument("--patterns", default="0.5,0.7,2:4")
    parser.add_argument("--methods", default=";".join(PRUNERS), help="separated by semicolons")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--brute-force", action="store_true")
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    weights, held, seen = moments_of(args)
    if args.brute_force:
        brute_force(weights, seen[-1], args.methods.split(";"))
        return
    rows: list[Row] = []
    for count, folds in zip(map(int, args.windows.split(",")), seen, strict=True):
        for text in args.patterns.split(","):
            rows += list(compare(weights, folds, held, (count, text), args.methods.split(";")))
            if args.output:
                args.output.write_text(json.dumps([asdict(row) for row in rows], indent=1))
            show([row for row in rows if (row.windows, row.pattern) == (count, text)])


Folds = dict[str, tuple[Moments, Moments]]


def moments_of(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Moments], list[Folds]]:
    """The weights, the held-out moments, and the two folds of the calibration moments for each number of windows."""
    key = [str(value) for value in (args.model, args.dataset, args.held_out, args.operators, args.windows, args.length)]
    if args.moments and args.moments.exists():
        known, *found = torch.load(args.moments, weights_only=False)
        if known == key:
            return found[0], found[1], found[2]
    model = load(args.model, device="cpu", dtype=torch.float32)
    weights = {name: model.model.get_parameter(f"{name}.weight").detach() for name in args.operators.split(",")}
    held = watch(model, weights, text_windows(args.held_out, model, args.length)[20:32], torch.float32)
    calibration = text_windows(args.dataset, model, args.length)
    seen: list[Folds] = []
    last = 0
    for count in map(int, args.windows.split(",")):
        new = [watch(model, weights, calibration[last + k : count : 2], torch.float32) for k in (0, 1)]
        pairs = {name: (new[0][name], new[1][name]) for name in weights}
        if seen:
            pairs = {n: (seen[-1][n][0] + first, seen[-1][n][1] + second) for n, (first, second) in pairs.items()}
        seen.append(pairs)
        last = count
    if args.moments:
        torch.save((key, weights, held, seen), args.moments)
    return weights, held, seen


def compare(
    weights: dict[str, Tensor], folds: Folds, held: dict[str, Moments], case: tuple[int, str], methods: list[str]
) -> Iterator[Row]:
    """Every method on every operator."""
    count, text = case
    pattern = parse_pattern(text) if ":" in text else parse_pattern("unstructured", float(text))
    for operator, weight in weights.items():
        problem = LayerProblem(weight, folds[operator][0] + folds[operator][1], pattern, folds=folds[operator])
        unseen = LayerProblem(weight, held[operator], pattern)
        for method in methods:
            began = time.perf_counter()
            pruned = PRUNERS[method].prune(problem)
            seconds = time.perf_counter() - began
            errors = [float(p.squared_error(pruned.weight).sum() / p.energy.sum()) for p in (problem, unseen)]
            yield Row(count, text, method, operator, errors[0], errors[1], pruned.products, seconds)


def brute_force(weights: dict[str, Tensor], folds: Folds, methods: list[str], draws: int = 2) -> None:
    """The error of each method over the least of all supports, on small real problems."""
    found: list[dict[str, float]] = []
    for operator, weight in weights.items():
        moments = folds[operator][0] + folds[operator][1]
        for draw in range(draws):
            generator = torch.Generator().manual_seed(draw)
            columns = torch.randperm(weight.shape[1], generator=generator)[:20]
            rows = torch.randperm(weight.shape[0], generator=generator)[:24]
            small = Moments(20, torch.float64)
            root = torch.linalg.cholesky(moments.gram.double()[columns][:, columns])
            small.add(root.T * 20**0.5)  # twenty tokens with this very Gram matrix
            problem = LayerProblem(weight[rows][:, columns].double(), small, Unstructured(0.5, "row"))
            found.append(excess(problem, {method: PRUNERS[method] for method in methods}))
    for method in methods:
        ratios = [ratio[method] for ratio in found]
        print(f"{method}: mean {sum(ratios) / len(ratios):.4f}, worst {max(ratios):.4f}", flush=True)


def show(rows: list[Row]) -> None:
    """The table of one pattern."""
    base = {row.operator: row for row in rows if row.method == "sparsegpt"}
    print(f"\n{rows[0].windows} windows, {rows[0].pattern}\n")
    print(
        "| method | calibration | held-out | calibration by operator | products | seconds |\n|---|---|---|---|---|---|"
    )
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        seen = [row.calibration / base[row.operator].calibration for row in own]
        held = [row.held_out / base[row.operator].held_out for row in own]
        each = " ".join(f"{ratio:.3f}" for ratio in seen)
        products, seconds = max(row.products for row in own), sum(row.seconds for row in own)
        print(f"| {method} | {mean(seen):.3f} | {mean(held):.3f} | {each} | {products} | {seconds:.1f} |", flush=True)
    for own in (row for row in rows if row.method == "fista (default)"):
        best = min((r for r in rows if r.method in PUBLISHED and r.operator == own.operator), key=lambda r: r.held_out)
        word = "not above" if own.held_out <= best.held_out else "ABOVE"
        print(
            f"{own.operator}: held-out {own.held_out:.5f}, {word} the best published, {best.method} {best.held_out:.5f}"
        )


def mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    main()
