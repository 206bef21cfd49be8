"""The tables of docs/channels.md and docs/heads.md: what is removed by several methods, on the same moments; the speed.

    python benchmarks/channels.py MODEL --text valid.txt --eval test.txt python-docs [--widths 1344,1152,896] [--moments F]
    python benchmarks/channels.py MODEL --text valid.txt --eval test.txt --remove heads --widths 2  # of the KV groups

The dense model is run once on the calibration text, and the moments of what reads the channels are kept in a file. Each
method prunes by them: that is what `convexprune prune --pattern channels` does with its defaults, where each layer sees
what the dense network sends. Weights are put into the dense model with zeros, which computes what the narrower one
does. A result is printed when it is there, and written to `--out`, from which a run that is started again goes on.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune.adapters import HuggingFaceModel, load, text_windows
from convexprune.adapters._gradients import loss_fisher
from convexprune.adapters._removal.heads import find_heads
from convexprune.adapters._removal.narrowing import Narrowing, find_narrowing
from convexprune.constraints import Channels, Constraint, Heads
from convexprune.core._moments import Moments
from convexprune.errors import PatternError
from convexprune.pruners import (
    OSSCAR,
    AbstractPruner,
    Convex,
    LayerProblem,
    Magnitude,
    Refitted,
    Wanda,
    WandaSP,
)
from convexprune.validation import perplexity
from convexprune.validation._texts import text_of
from convexprune.validation._timing import Timing, time_in_turns, timing

BY_LOSS = "convexprune"  # which the loss chooses for
METHODS: dict[str, AbstractPruner] = {
    "magnitude": Magnitude(),
    "Wanda-sp": WandaSP(),
    "Wanda-sp + refit": Refitted(WandaSP()),
    "Wanda, norms + refit": Refitted(Wanda()),
    "group OBS": OSSCAR(exchanged=0),
    "OSSCAR": OSSCAR(),
    "OSSCAR + refit": Refitted(OSSCAR()),
    "the path, no refit": Convex(choices=0, refit=None),
    "the path": Convex(choices=0),
    "convexprune, searched": Convex(),
    BY_LOSS: Convex(),
}
REMOVED: dict[str, tuple[Callable[[HuggingFaceModel, Constraint], Narrowing], Callable[[float], Constraint]]] = {
    "channels": (find_narrowing, partial(Channels, multiple=1)),
    "heads": (find_heads, Heads),
}


def _add(moments: Moments, x: Tensor) -> None:
    moments.add(x.flatten(0, -2))


def collected(model: HuggingFaceModel, windows: Tensor, patterns: Mapping[str, Constraint]) -> dict[str, Any]:
    """Return the sums of x x' of each operator on two halves of the windows, and what the loss needs of x."""
    blocks = [(name, pattern.block) for name, pattern in patterns.items()]
    needs = {name: each for (name, _), each in loss_fisher(model, windows, blocks=blocks).inputs.items()}
    operators = {f"{y.name}.{o.name}": o for y in model.layers for o in y.operators}
    halves = {name: [Moments(o.shape[1]), Moments(o.shape[1])] for name, o in operators.items()}
    groups = {f"{y.name}.{o.name}": g for y in model.layers for g in y.groups for o in g.operators}
    for half, part in enumerate((windows[::2], windows[1::2])):
        with ExitStack() as hooks:
            for name, group in groups.items():
                hooks.enter_context(group.input_hook(partial(_add, halves[name][half])))
            for window in part:
                model.forward(window[None])
    sums = {name: [(m.sum, m.tokens) for m in pair] for name, pair in halves.items()}
    return {"halves": sums, "needs": needs}


def problem(
    weight: Tensor, pair: Sequence[tuple[Tensor, int]], pattern: Constraint, needs: Tensor | None
) -> LayerProblem:
    folds = []
    for total, tokens in pair:
        fold = Moments(0)
        fold.sum, fold.tokens = total, tokens
        folds.append(fold)
    importance = None if needs is None else needs.repeat_interleave(pattern.block).expand_as(weight)
    return LayerProblem(weight, folds[0] + folds[1], pattern, 0.0, tuple(folds), importance)


def prune(
    model: HuggingFaceModel,
    moments: dict[str, Any],
    dense: dict[str, Tensor],
    method: str,
    patterns: Mapping[str, Constraint],
) -> None:
    """Put the pruned weights into the model."""
    for layer in model.layers:
        for operator in layer.operators:
            name = f"{layer.name}.{operator.name}"
            needs = moments["needs"][name] if method == BY_LOSS else None
            posed = problem(dense[name], moments["halves"][name], patterns[name], needs)
            edit = METHODS[method].prune(posed)
            assert posed.pattern.violation(edit.weight) == 0
            operator.write(edit.weight)


def speed(model: HuggingFaceModel, narrowing: Narrowing, seconds: float, tokens: int = 32) -> list[Timing]:
    """Tokens a second, dense and without as much: one prompt, greedy, in turns."""
    models: dict[str, Any] = {"dense": model.model}
    models["narrower"] = narrowing.narrowed(model.model.get_parameter).model(model)
    asked = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    runs = {name: partial(each.generate, model.probe_tokens(), **asked) for name, each in models.items()}
    times = time_in_turns(runs, "cpu", seconds, lambda _: tokens)
    return [timing("decode", 1, name, times, "dense", 0, 1) for name in runs]


def _able(narrowing: Narrowing) -> Iterator[str]:
    """The methods that take the patterns."""
    for name, method in METHODS.items():
        with suppress(PatternError):
            for pattern in narrowing.patterns.values():
                method.require(pattern)
            yield name


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--eval", nargs="+", required=True)
    parser.add_argument("--remove", choices=REMOVED, default="channels")
    parser.add_argument("--widths", default="1344,1152,896", help="how many are left: channels, or KV groups of heads")
    parser.add_argument("--methods", help="separated by semicolons; left out: all that can")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--eval-windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--moments", type=Path, default=Path("moments.pt"))
    parser.add_argument("--out", type=Path, default=Path("channels.jsonl"))
    parser.add_argument("--speed-seconds", type=float, default=60, help="for each width; 0: generation is not timed")
    return parser.parse_args()


def _moments(asked: argparse.Namespace, model: HuggingFaceModel, patterns: Mapping[str, Constraint]) -> dict[str, Any]:
    """What `collected` gives, from the file if it is there."""
    if not asked.moments.exists():
        every = text_windows(asked.text, model, asked.length)
        drawn = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: asked.windows]]
        torch.save(collected(model, drawn, patterns), asked.moments)
    return torch.load(asked.moments)


def _measure(
    asked: argparse.Namespace, model: HuggingFaceModel, texts: dict[str, Tensor]
) -> Callable[[str, int, Callable[[], None]], None]:
    """What prunes by a method to a width and prints a row, if the file has none of them."""
    done = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []

    def measure(method: str, width: int, prune: Callable[[], None]) -> None:
        if any((row["method"], row["width"]) == (method, width) for row in done):
            return
        began = time.perf_counter()
        prune()
        seconds = time.perf_counter() - began
        row = {"method": method, "width": width, "seconds": round(seconds, 1)}
        row |= {name: round(perplexity(model.model, each).value, 2) for name, each in texts.items()}
        with asked.out.open("a") as file:
            print(json.dumps(row), file=file)
        print(row, flush=True)

    return measure


@torch.no_grad()
def main() -> None:
    asked = _asked()
    model = load(asked.model, device="cpu", dtype=torch.float32)
    find, kind = REMOVED[asked.remove]
    whole = find(model, kind(0.5))
    size = whole.sets[0].size
    narrowings = {width: find(model, kind(1 - width / size)) for width in map(int, asked.widths.split(","))}
    whole.choose(model)
    texts = {Path(text).stem: text_windows(text_of(text), model, asked.length) for text in asked.eval}
    texts = {
        name: each[:: max(1, len(each) // asked.eval_windows)][: asked.eval_windows] for name, each in texts.items()
    }
    moments = _moments(asked, model, whole.patterns)
    dense = {f"{y.name}.{o.name}": o.read().clone() for y in model.layers for o in y.operators}
    measure = _measure(asked, model, texts)
    measure("dense", size, lambda: None)
    for width, narrowing in narrowings.items():
        for method in asked.methods.split(";") if asked.methods else _able(narrowing):
            measure(method, width, partial(prune, model, moments, dense, method, narrowing.patterns))
        if asked.speed_seconds:
            for layer in model.layers:
                for each in layer.operators:
                    each.write(narrowing.patterns[f"{layer.name}.{each.name}"].project(each.read()))
            for t in speed(model, narrowing, asked.speed_seconds):
                row = {
                    "width": width,
                    "model": t.format,
                    "tokens/s": t.tokens_per_second,
                    "time over dense": t.over_dense,
                }
                print(row | {"middle half": t.middle_half, "rounds": t.rounds}, flush=True)


if __name__ == "__main__":
    main()
