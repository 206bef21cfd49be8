"""FISTA on real layer problems: iterations to a relative gap beside the plain method, and time over the bare product.

    python benchmarks/solver.py MODEL --dataset text.txt --operators model.layers.1.self_attn.q_proj,...

The problem is the LASSO that FISTAPruner states (and its scaled form), float64, cold start at the dense weight, with the
strength that leaves half of the weights zero (bisection). Times are float32.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from convexprune import L1, Moments, Problem, Quadratic
from convexprune.adapters import HuggingFaceModel, calibration_and_held_out, load
from convexprune.solvers._fista import FISTA

SOLVERS = {
    "plain": {"scale": False, "restart": False},
    "restart": {"scale": False},
    "scale": {"restart": False},
    "scale+restart": {},
}
GAPS = (1e-2, 1e-4, 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", default="self")
    parser.add_argument("--operators", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--limit", type=int, default=3000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = load(args.model, device="cpu", dtype=torch.float32)
    names = args.operators.split(",")
    tokens = calibration_and_held_out(
        args.dataset, model, num_samples=args.samples, max_seq_length=args.length, seed=0
    )[0]
    weights = {name: model.model.get_parameter(f"{name}.weight") for name in names}
    problems = {name: (weights[name], moments) for name, moments in watch(model, weights, tokens).items()}
    rows = []
    for name, (weight, moments) in problems.items():
        rows += list(iterations(name, weight[: args.rows].double(), moments, args.limit))
        rows.append(seconds(name, weight, moments))
        if args.output:
            args.output.write_text(json.dumps(rows, indent=2))


def watch(
    model: HuggingFaceModel, weights: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype = torch.float64
) -> dict[str, Moments]:
    """The dense moments of the operators of that name."""
    moments = {name: Moments(weight.shape[1], dtype) for name, weight in weights.items()}

    def keep(name: str):
        return lambda _, args: moments[name].add(args[0])

    hooks = [model.model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in weights]
    for batch in tokens.split(1):
        model.model.base_model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return moments


def iterations(name: str, weight: Tensor, moments: Moments, limit: int):
    quadratic = moments.reconstruction(weight)
    for kind, unit in (("paper's L1", torch.ones(weight.shape[1])), ("scaled L1", quadratic.scale())):
        strength = half_strength(quadratic, unit.double())
        problem = Problem(quadratic, L1(strength * unit.double()))
        for solver, settings in SOLVERS.items():
            row: dict[str, object] = {"operator": name, "penalty": kind, "solver": solver}
            for gap in GAPS:
                s = FISTA(tolerance=gap, max_iterations=limit, check_every=20, **settings).solve(problem)
                row[f"{gap:.0e}"] = s.iterations if s.certificate.relative_gap <= gap else f">{limit}"
                if s.certificate.relative_gap > gap:
                    break
            print(row, flush=True)
            yield row


def half_strength(quadratic: Quadratic, unit: Tensor) -> float:
    """The strength at which half of the solution is zero, by bisection on solutions with a gap of 1e-3."""
    low, high, weight = 0.0, float((quadratic.at(None).cross.abs() / unit).max()), quadratic.anchor
    for _ in range(20):
        middle = (low * high) ** 0.5 if low else high / 1000
        weight = FISTA(tolerance=1e-3).solve(Problem(quadratic, L1(middle * unit)), weight).weight
        low, high = (middle, high) if float((weight == 0).double().mean()) < 0.5 else (low, middle)
    return high


def seconds(name: str, weight: Tensor, moments: Moments, repeats: int = 7, count: int = 100) -> dict[str, object]:
    """Median time of an iteration over that of the bare product, interleaved, float32."""
    quadratic = moments.reconstruction(weight.double())
    quadratic = Quadratic(quadratic.gram.float(), quadratic.cross.float(), quadratic.energy.float(), weight)
    problem = Problem(quadratic, L1(1e-3 * quadratic.scale()))
    scale = quadratic.scale()
    inner = Problem(quadratic.scaled(scale), problem.penalty.scaled(scale))
    solver, start = FISTA(max_iterations=count, check_every=count + 1), weight * scale
    assert inner.quadratic.lipschitz > 0  # computed here, once, and kept: not a part of an iteration
    out, ratios, products = torch.empty_like(weight), [], []
    for _ in range(repeats):
        began = time.perf_counter()
        solver._iterate(inner, start)
        middle = time.perf_counter()
        for _ in range(count):
            torch.mm(start, inner.quadratic.gram, out=out)
        end = time.perf_counter()
        ratios.append((middle - began) / (end - middle))
        products.append((end - middle) / count)
    row = {
        "operator": name,
        "shape": list(weight.shape),
        "product_ms": 1e3 * statistics.median(products),
        "iteration_over_product": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "threads": torch.get_num_threads(),
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
