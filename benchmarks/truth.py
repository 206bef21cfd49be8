"""How far every pruner is from the true optimum: squared error / least squared error over all supports.

python benchmarks/truth.py     blocks of 12 columns (a multiple of 4) of real operators of the bundled OPT, one half pruned
"""

import argparse
import math

import torch
from brute_force import best_pruning

from convexprune._layerwise.settings import LayerSettings
from convexprune.adapters import EMBEDDED, calibration_and_held_out, load
from convexprune.constraints import parse_pattern
from convexprune.core._bound import LowerBound
from convexprune.core._moments import Moments
from convexprune.pruners import ADMM, PRUNERS, Convex, LayerProblem
from convexprune.recipe import make_recipe
from convexprune.validation._layer_problems import OperatorProblem, operator_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    recipe = make_recipe(model=str(EMBEDDED), method="magnitude", sparsity=0.5, error_correction=0)
    model = load(EMBEDDED, device="cpu", dtype=torch.float32)
    tokens = calibration_and_held_out("self", model, num_samples=args.samples, max_seq_length=256, seed=0)[0]
    settings = LayerSettings(recipe.build_pruner(), recipe.build_pattern(), 0)
    layer = model.layers[1]
    names = [f"{layer.name}.{operator.name}" for operator in layer.operators]
    operators = list[OperatorProblem]()
    operator_problems(model, tokens, settings, names, operators.append)
    pruners = {name: cls() for name, cls in PRUNERS.items()}
    pruners |= {"convex": Convex(damping=1e-4), "admm": ADMM(damping=1e-4)}
    for pattern in (
        parse_pattern("unstructured", 0.5),
        parse_pattern("unstructured", 0.5, "row"),
        parse_pattern("2:4"),
    ):
        ratios: dict[str, list[float]] = {name: [] for name in (*pruners, "lower bound")}
        for number, operator in enumerate(operators):
            problem = small(operator.dense, operator.moments, args.rows, args.columns, pattern, number)
            best = best_pruning(problem)
            least = float(problem.squared_error(best).sum())
            for name, pruner in pruners.items():
                ratios[name].append(float(problem.squared_error(pruner.prune(problem).weight).sum()) / least)
            ratios["lower bound"].append(LowerBound().of(problem.quadratic, pattern, best).lower / least)
        for name, values in ratios.items():
            mean = math.exp(sum(math.log(max(v, 1e-9)) for v in values) / len(values))
            optimal = sum(abs(v - 1) < 1e-3 for v in values)
            print(f"| {pattern} | {name} | {mean:.4f} | {max(values):.4f} | {optimal} of {len(values)} |", flush=True)


def small(weight, moments: Moments, rows: int, columns: int, pattern, seed: int) -> LayerProblem:
    """Some rows and columns of an operator as a pruning problem of their own."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(weight.shape[1], generator=generator)[:columns].sort().values
    drawn = torch.randperm(weight.shape[0], generator=generator)[:rows]
    part = Moments(columns, torch.float64)
    part.tokens = moments.tokens
    part.sum = moments.sum[chosen][:, chosen]
    return LayerProblem(weight[drawn][:, chosen].double(), part, pattern, 0.0)


if __name__ == "__main__":
    main()
