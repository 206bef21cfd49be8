"""Few tokens and many: largest weights, errors and divergence of the default beside SparseGPT, on the same tokens.

    python benchmarks/tokens.py [MODEL] --dataset text.txt --held-out text.txt --tokens 128,512,2048,8192,65536

Each operator is pruned alone on its dense inputs, by both methods. *Growth* is the largest weight over the dense
operator's largest. Errors are relative to the output, and geometric means over the operators. *Worse* counts operators
whose error on a held-out text is above SparseGPT's. KL is the divergence from the dense model with all operators pruned.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean

import torch
from layers import Folds
from solver import watch
from torch import Tensor

from convexprune import Moments, parse_pattern
from convexprune.adapters import EMBEDDED, HuggingFaceModel, calibration_and_held_out, load, text_windows
from convexprune.pruners import AbstractPruner, Convex, LayerProblem, SparseGPT
from convexprune.validation._perplexity import fit, of_model

METHODS: dict[str, AbstractPruner] = {"sparsegpt": SparseGPT(), "convex": Convex()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(EMBEDDED))
    parser.add_argument("--dataset", default="self")
    parser.add_argument("--held-out", required=True, action="append", help="a text; repeat it for more")
    parser.add_argument("--tokens", default="128,512,2048,8192,65536")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64, help="of a held-out text")
    parser.add_argument("--layers", help="numbers of decoder layers; left out: all")
    parser.add_argument("--pattern", default="unstructured:0.5")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, dense = (load(args.model, device="cpu", dtype=torch.float32) for _ in range(2))
    weights = weights_of(model, args.layers)
    counts = [int(each) for each in args.tokens.split(",")]
    asked = {"num_samples": max(counts) // args.length, "max_seq_length": args.length, "seed": 0}
    windows = calibration_and_held_out(args.dataset, model, **asked)[0]
    texts = {Path(text).stem: text_windows(text, model, args.length)[: args.windows] for text in args.held_out}
    unseen = {name: watch(dense, weights, tokens, torch.float32) for name, tokens in texts.items()}
    rows = []
    print(f"| tokens | method | growth | calibration | {' | '.join(texts)} | worse | KL {' | KL '.join(texts)} |")
    print("|" + "---|" * (5 + 2 * len(texts)))
    for count, folds in nested(dense, weights, windows, [count // args.length for count in counts]):
        found = {name: pruned(weights, folds, args.pattern, pruner, unseen) for name, pruner in METHODS.items()}
        for name, (values, errors, growth) in found.items():
            pairs = [(errors[key], found["sparsegpt"][1][key]) for key in errors if key[0] != "calibration"]
            worse = sum(ours > others for ours, others in pairs)
            means = [mean(errors, text) for text in ("calibration", *texts)]
            for operator, value in values.items():
                model.model.get_parameter(f"{operator}.weight").copy_(value)
            both = [of_model(each.model) for each in (dense, model)]
            divergences = [fit(tokens[:24], *both)[1][1] for tokens in texts.values()]
            cells = [f"{count * args.length:,}", name, f"{growth:.1f}", *(f"{100 * each:.3f}" for each in means)]
            cells += [f"{worse} of {len(pairs)}", *(f"{each:.4f}" for each in divergences)]
            print(f"| {' | '.join(cells)} |", flush=True)
            rows.append([count * args.length, name, growth, means, worse, divergences])
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


def weights_of(model: HuggingFaceModel, layers: str | None) -> dict[str, Tensor]:
    """Return the dense weights of all operators of some decoder layers, by name."""
    chosen = range(len(model.layers)) if layers is None else map(int, layers.split(","))
    names = [f"{model.layers[i].name}.{operator.name}" for i in chosen for operator in model.layers[i].operators]
    return {name: model.model.get_parameter(f"{name}.weight").detach().clone() for name in names}


def nested(
    model: HuggingFaceModel, weights: dict[str, Tensor], windows: Tensor, counts: list[int]
) -> Iterator[tuple[int, Folds]]:
    """Yield the moments of two halves of the first windows, for each number of windows; ascending."""
    halves = [{name: Moments(weight.shape[1]) for name, weight in weights.items()} for _ in range(2)]
    last = 0
    for count in counts:
        for k, half in enumerate(halves):
            if len(part := windows[last:count][(k + last) % 2 :: 2]):
                new = watch(model, weights, part, torch.float32)
                halves[k] = {name: half[name] + new[name] for name in weights}
        last = count
        yield count, {name: (halves[0][name], halves[1][name]) for name in weights}


def pruned(
    weights: dict[str, Tensor], folds: Folds, text: str, pruner: AbstractPruner, unseen: dict[str, dict[str, Moments]]
) -> tuple[dict[str, Tensor], dict[tuple[str, str], float], float]:
    """Return the pruned weights, their errors by text and operator, and the largest growth."""
    values, errors, growth = dict[str, Tensor](), dict[tuple[str, str], float](), 0.0
    kind, _, share = text.partition(":")
    pattern = parse_pattern(kind, float(share)) if share.startswith("0.") else parse_pattern(text)
    for name, weight in weights.items():
        halves = folds[name] if folds[name][1].tokens else ()
        problem = LayerProblem(weight, folds[name][0] + folds[name][1], pattern, folds=halves)
        values[name] = pruner.prune(problem).weight
        growth = max(growth, float(values[name].abs().max() / weight.abs().max()))
        for other, moments in {"calibration": problem.moments, **{t: m[name] for t, m in unseen.items()}}.items():
            judge = LayerProblem(weight, moments, pattern)
            errors[other, name] = float(judge.squared_error(values[name]).sum() / judge.energy.sum())
    return values, errors, growth


def mean(errors: dict[tuple[str, str], float], text: str) -> float:
    """Return the geometric mean of the errors on a text."""
    return geometric_mean(error for (other, _), error in errors.items() if other == text)


if __name__ == "__main__":
    main()
