"""The table of docs/layers.md: decoder layers removed, by which score they are chosen and what makes up for them.

    python benchmarks/depth.py MODEL --text valid.txt --eval test.txt other.txt [--counts 2,3,6] [--out F]

Layers are chosen on windows of the calibration text on which nothing is fitted. What is behind them is then refitted, as
`convexprune prune --pattern layers` does, and the dense weights are put back. A result is printed when it is there, and
written to `--out` with the KL divergence from dense, from which a run that is started again goes on.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune._layerwise.steps.prune import Work
from convexprune._runs.run import prune_in_place
from convexprune.adapters import load, text_windows
from convexprune.adapters._removal.depth import layers_to_remove
from convexprune.adapters._removal.shortening import find_shortening
from convexprune.constraints import Layers
from convexprune.pruners import Convex, ShortGPT
from convexprune.recipe import make_recipe
from convexprune.validation import final_states, mean_kl, perplexity

SCORES = ("divergence", "influence")


THEN = {"nothing": ShortGPT(), "refit": Convex()}
"""The pruner of what is behind the layers that are gone."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--eval", nargs="+", required=True)
    parser.add_argument("--counts", default="2,3,6")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--eval-windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("depth.jsonl"))
    asked = parser.parse_args()
    model = load(asked.model, device="cpu", dtype=torch.float32)
    texts = {Path(text).stem: text_windows(text, model, asked.length) for text in asked.eval}
    texts = {
        name: each[:: max(1, len(each) // asked.eval_windows)][: asked.eval_windows] for name, each in texts.items()
    }
    every = text_windows(asked.text, model, asked.length)
    drawn = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    tokens, held_out = drawn[: asked.windows], drawn[asked.windows :][: max(1, asked.windows // 8)]
    dense = {layer.name: {n: t.clone() for n, t in model.state(layer).items()} for layer in model.layers}
    done = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []

    def predicted() -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        """The perplexity of each text, and the hidden states after the last layer."""
        values, kept = dict[str, float](), dict[str, list[Tensor]]()
        for name, windows in texts.items():
            with final_states(model, len(windows)) as kept[name]:
                values[name] = round(perplexity(model.model, windows).value, 2)
        return values, kept

    dense_values, dense_states = predicted()

    def record(row: dict[str, Any], seconds: float) -> None:
        values, states = predicted()
        row |= {n: [values[n], round(mean_kl(model, texts[n], dense_states[n], states[n]), 4)] for n in texts}
        row["seconds"] = round(seconds, 1)
        with asked.out.open("a") as file:
            print(json.dumps(row), file=file)
        print(row, flush=True)
        for layer in model.layers:
            model.load_state(layer, dense[layer.name])

    def known(**row: Any) -> dict[str, Any] | None:
        return next((each for each in done if row.items() <= each.items()), None)

    model.calls(texts[next(iter(texts))][:1])
    print({"score": "dense"} | dense_values, flush=True)
    for count in map(int, asked.counts.split(",")):
        share = count / len(model.layers)
        removal = find_shortening(model, Layers(share))
        settings = make_recipe(pattern="layers", sparsity=share).layer_settings()
        for score in SCORES:
            chosen = known(score=score, count=count)
            began = time.perf_counter()
            numbers = (
                chosen["layers"] if chosen else layers_to_remove(model, held_out, score, removal.allowed, count, list)
            )
            took = time.perf_counter() - began
            reduced = removal.without(numbers)
            for name, pruner in THEN.items():
                if known(score=score, count=count, then=name):
                    continue
                began = time.perf_counter()
                reduced.choose(model)
                how = replace(settings, pruner=pruner, removed=reduced.idle_layers)
                prune_in_place(model, Work(tokens, held_out, 4, how), lambda _: None)
                seconds = time.perf_counter() - began
                record(
                    {"score": score, "count": count, "then": name, "layers": numbers, "chosen": round(took, 1)}, seconds
                )


if __name__ == "__main__":
    main()
