"""The table of docs/layers.md: decoder layers removed, by which score they are chosen and what makes up for them.

    python benchmarks/depth.py MODEL --text valid.txt --eval test.txt python-docs [--counts 2,3,6] [--out F]

Layers are chosen on windows of the calibration text on which nothing is fitted. What is behind them is then refitted, as
`convexprune prune --pattern layers` does, and the dense weights are put back. A result is printed when it is there, and
written to `--out` with the KL divergence from dense, from which a run that is started again goes on.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.work import Work, prune_claimed
from convexprune.adapters import HuggingFaceModel, last_states, load, of_states, text_windows
from convexprune.adapters._removal.shortening import find_shortening, layers_to_remove
from convexprune.constraints import Layers
from convexprune.pruners import Convex, ShortGPT
from convexprune.recipe import make_recipe
from convexprune.validation._perplexity import fit
from convexprune.validation._texts import text_of

SCORES = ("divergence", "influence")
THEN = {"nothing": ShortGPT(), "refit": Convex()}
"""The pruner of what is behind the layers that are gone."""
Row = dict[str, Any]


class Table:
    """The rows that are there, and what makes new ones: the texts, and the dense model to measure beside.

    Args:
        model: the dense model, in memory.
        texts: windows [windows length] by name.
        out: the file of the rows.
    """

    def __init__(self, model: HuggingFaceModel, texts: Mapping[str, Tensor], out: Path) -> None:
        self._model, self._texts, self._out = model, texts, out
        self._rows: list[Row] = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        self._weights = {layer.name: {n: t.clone() for n, t in model.state(layer).items()} for layer in model.layers}
        values, self._dense = self._predicted()
        print({"score": "dense"} | values, flush=True)

    def known(self, **row: Any) -> Row | None:
        """The first row that has these entries."""
        return next((each for each in self._rows if row.items() <= each.items()), None)

    def add(self, row: Row, seconds: float) -> None:
        """Measure the pruned model, write a row, and put the dense weights back."""
        values, states = self._predicted()
        for name, windows in self._texts.items():
            divergence = fit(windows, *(of_states(self._model, each[name]) for each in (self._dense, states)))[1][1]
            row[name] = [values[name], round(divergence, 4)]
        row["seconds"] = round(seconds, 1)
        with self._out.open("a") as file:
            print(json.dumps(row), file=file)
        print(row, flush=True)
        for layer in self._model.layers:
            self._model.load_state(layer, self._weights[layer.name])

    def _predicted(self) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        """The perplexity of each text, and the hidden states after the last layer."""
        values, kept = dict[str, float](), dict[str, list[Tensor]]()
        for name, windows in self._texts.items():
            kept[name] = list(last_states(self._model, windows))
            values[name] = round(fit(windows, of_states(self._model, kept[name]))[0][0].value, 2)
        return values, kept


def remove(model: HuggingFaceModel, table: Table, tokens: Tensor, held_out: Tensor, count: int) -> None:
    """Remove so many layers by each score, with and without a refit of what is behind them."""
    share = count / len(model.layers)
    removal = find_shortening(model, Layers(share))
    settings = make_recipe(pattern="layers", sparsity=share).layer_settings()
    for score in SCORES:
        known, began = table.known(score=score, count=count), time.perf_counter()
        numbers = known["layers"] if known else layers_to_remove(model, held_out, score, removal.allowed, count, list)
        row = {"score": score, "count": count, "layers": numbers, "chosen": round(time.perf_counter() - began, 1)}
        reduced = removal.without(numbers)
        for name, pruner in THEN.items():
            if table.known(score=score, count=count, then=name) is None:
                began = time.perf_counter()
                reduced.choose(model)
                how = replace(settings, pruner=pruner, emptied=reduced.emptied)
                states = MemoryStore(range(len(model.layers)))
                prune_claimed(model, states, Work(tokens, held_out, 4, how), lambda _: None)
                table.add(row | {"then": name}, time.perf_counter() - began)


@torch.no_grad()
def main() -> None:
    """Print the table."""
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
    model, some = load(asked.model, device="cpu", dtype=torch.float32), asked.eval_windows
    whole = {Path(text).stem: text_windows(text_of(text), model, asked.length) for text in asked.eval}
    texts = {name: each[:: max(1, len(each) // some)][:some] for name, each in whole.items()}
    every = text_windows(asked.text, model, asked.length)
    drawn = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    tokens, held_out = drawn[: asked.windows], drawn[asked.windows :][: max(1, asked.windows // 8)]
    table = Table(model, texts, asked.out)
    model.calls(next(iter(texts.values()))[:1])
    for count in map(int, asked.counts.split(",")):
        remove(model, table, tokens, held_out, count)


if __name__ == "__main__":
    main()
