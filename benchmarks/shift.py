"""What another kind of text changes: the energy of directions and of inputs, beside what the halves of a sample say.

    python benchmarks/shift.py [MODEL] --dataset text.txt --other text.txt --layers 3,12,21

Directions are those of the sample's correlations; a band has the eigenvalues between its two numbers. Its figure is the
mean energy of its directions on another text, over the eigenvalue. *Noise* and *burstiness* are those of
`convexprune.core`; beside them, the share of the sample's correlations that the text has, <C_other, C> / <C, C> of
entries off the diagonal, and the variance of the change of an input's log energy. Medians over the operators.
"""

import argparse
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from solver import watch
from tokens import nested, weights_of
from torch import Tensor

from convexprune import Moments
from convexprune.adapters import EMBEDDED, calibration_and_held_out, load, text_windows
from convexprune.core import burstiness, sampling_noise

BANDS = (1e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(EMBEDDED))
    parser.add_argument("--dataset", default="self")
    parser.add_argument("--other", required=True, action="append", help="a text; repeat it for more")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="of each other text")
    parser.add_argument("--layers", help="numbers of decoder layers; left out: all")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = load(args.model, device="cpu", dtype=torch.float32)
    weights = weights_of(model, args.layers)
    asked = {"num_samples": args.samples, "max_seq_length": args.length, "seed": 0}
    windows = calibration_and_held_out(args.dataset, model, **asked)[0]
    ((_, folds),) = nested(model, weights, windows, [args.samples])
    kinds = defaultdict[str, list[str]](list)
    for name in weights:
        kinds[name.rpartition(".")[2]].append(name)
    bands = " | ".join(f"{low:g} to {high:g}" for low, high in pairwise(BANDS))
    print(f"| text | operator | noise | shared | burstiness | variance over it | {bands} |")
    print("|" + "---|" * (5 + len(BANDS)))
    for text in args.other:
        seen = watch(model, weights, text_windows(Path(text), model, args.length)[: args.windows], torch.float32)
        for kind, names in kinds.items():
            rows = [row(folds[name], seen[name]) for name in names]
            known = [[each for each in column if each is not None] for column in zip(*rows, strict=True)]
            cells = [f"{median(column):.3g}" if column else "" for column in known]
            print(f"| {Path(text).stem} | {kind} | {' | '.join(cells)} |", flush=True)


def row(folds: tuple[Moments, Moments], other: Moments) -> list[float | None]:
    """Return noise, shared correlations, burstiness, the variance of changed log energies, and the change by band."""
    ours, theirs = ((folds[0] + folds[1]).gram.double(), other.gram.double())
    live = (ours.diagonal() > 0) & (theirs.diagonal() > 0)
    ours, theirs = ours[live][:, live], theirs[live][:, live]
    changes = (theirs.diagonal() / ours.diagonal()).log()
    scale = ours.diagonal().sqrt()
    correlations = ours / scale / scale[:, None]
    eigenvalues, directions = torch.linalg.eigh(correlations)
    energies = ((theirs / scale / scale[:, None]) @ directions * directions).sum(0)
    found = burstiness(folds)
    root, off = theirs.diagonal().sqrt(), correlations.fill_diagonal_(0)
    shared = float((off * (theirs / root / root[:, None])).sum() / off.square().sum())
    return [sampling_noise(folds), shared, found, float(changes.var()) / found, *in_bands(eigenvalues, energies)]


def in_bands(eigenvalues: Tensor, energies: Tensor) -> list[float | None]:
    """Return the energies over the eigenvalues, by bands; None where a band has fewer than three."""
    inside = [(eigenvalues >= low) & (eigenvalues < high) for low, high in pairwise(BANDS)]
    return [float(energies[k].sum() / eigenvalues[k].sum()) if k.sum() > 2 else None for k in inside]


if __name__ == "__main__":
    main()
