"""The table of docs/channels.md, section OpenVINO: a smaller model run by OpenVINO on the CPU, beside transformers.

    pip install openvino
    python benchmarks/run_openvino.py DENSE SMALLER --text test.txt

Both folders are converted as they are. Each predicts the same windows of the text as transformers does with the folder.
Both read a window in turns.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn

from convexprune.adapters import HuggingFaceModel, load, text_windows
from convexprune.validation._timing import time_in_turns, timing

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


class Logits(nn.Module):
    """A model that takes ids and gives logits, and nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)  # without one, transformers looks for packed texts, which is not converted
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def converted(model: HuggingFaceModel, window: Tensor, threads: int) -> Any:
    """The model, compiled by OpenVINO for the CPU."""
    found = openvino.convert_model(Logits(model.model), example_input=window)
    return openvino.Core().compile_model(found, "CPU", EXACT | {"INFERENCE_NUM_THREADS": threads})


def logits(compiled: Any, window: Tensor) -> Tensor:
    """Those of each position [1 tokens words] of a window [1 tokens]."""
    return torch.from_numpy(np.array(compiled(window.numpy())[0]))


def compared(compiled: Any, model: HuggingFaceModel, windows: Tensor) -> tuple[float, float, float]:
    """Perplexities by OpenVINO and by transformers, and how far logits are apart, relative to their spread."""
    losses, apart = torch.zeros(2, dtype=torch.float64), list[Tensor]()
    for window in windows.split(1):
        there, here = logits(compiled, window), model.model(input_ids=window, use_cache=False).logits.float()
        for i, each in enumerate((there, here)):
            losses[i] += nn.functional.cross_entropy(each[0, :-1].double(), window[0, 1:]) / len(windows)
        apart.append((there - here).square().mean() / (here - here.mean(-1, keepdim=True)).square().mean())
    theirs, ours = losses.exp().tolist()
    return theirs, ours, float(torch.stack(apart).mean().sqrt())


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("smaller", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    asked = parser.parse_args()
    print(f"OpenVINO {openvino.__version__}\n\n| model | transformers | OpenVINO | apart |\n|---|---|---|---|")
    runs, windows = {}, torch.empty(0)
    for path in (asked.dense, asked.smaller):
        model = load(path, device="cpu", dtype=torch.float32)
        windows = text_windows(asked.text, model, asked.length)[: asked.windows]
        compiled = converted(model, windows[:1], asked.threads)
        theirs, ours, apart = compared(compiled, model, windows)
        print(f"| {path.name} | {ours:.3f} | {theirs:.3f} | {apart:.1e} |", flush=True)
        runs[path.name] = partial(compiled, windows[:1].numpy())
    times = time_in_turns(runs, "cpu", asked.seconds, lambda _: asked.length)
    for name in runs:
        t = timing("prefill", 1, name, times, asked.dense.name, 0, 1)
        low, high = t.middle_half
        print(f"{name}: {t.over_dense:.2f} of the time ({low:.2f} to {high:.2f}), {t.rounds} rounds")


if __name__ == "__main__":
    main()
