"""The way of one weight through the package: each function that is given it, or gives it back, by the first visit.

python benchmarks/way_of_a_weight.py [CHECKOUT]

A tiny model is pruned into a folder under Python's profiler. A stop is a function of ours with an argument or a result
that is a tensor of the shape of one operator, which no other tensor of the model has, or an object that holds one.
"""

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import convexprune

SHAPE = (24, 40)  # of down_proj; the others are (24, 24) and (40, 24)
CHECKOUT = Path(convexprune.__file__).resolve().parents[1]
OURS = tuple(f"{CHECKOUT / room}/" for room in ("convexprune", "adapters", "validation"))  # and no .venv beside them


def _holds(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.shape == SHAPE
    if isinstance(value, list | tuple):
        return any(isinstance(each, torch.Tensor) and each.shape == SHAPE for each in value)
    return any(
        isinstance(each, torch.Tensor) and each.shape == SHAPE for each in getattr(value, "__dict__", {}).values()
    )


class Way:
    """The stops, and the deepest stack of our own frames."""

    def __init__(self) -> None:
        self.stops: dict[tuple[str, str], int] = {}
        self.deepest = 0

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        place = str(Path(code.co_filename).resolve())
        if event not in ("call", "return") or not place.startswith(OURS):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [result] if event == "return" else [frame.f_locals[name] for name in names if name in frame.f_locals]
        if any(map(_holds, values)):
            where = (place, code.co_qualname)
            self.stops.setdefault(where, len(self.stops))
        if code.co_name in ("prox", "forward_backward"):
            depth, at = 0, frame
            while at is not None:
                depth += str(Path(at.f_code.co_filename).resolve()).startswith(OURS)
                at = at.f_back
            self.deepest = max(self.deepest, depth)


def main() -> None:
    """Print the stops."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    tokens = torch.randint(2, 60, (5, 16))
    way = Way()
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(Path(folder) / "dense")
        _ = convexprune.prune  # imported before it is watched
        sys.setprofile(way)
        convexprune.prune(
            Path(folder) / "dense", output_dir=Path(folder) / "out", dataset=tokens, num_calibration_samples=4
        )
        sys.setprofile(None)
    for place, name in way.stops:
        print(f"{Path(place).relative_to(CHECKOUT)}: {name}")
    print(
        f"{len(way.stops)} stops in {len({place for place, _ in way.stops})} files; {way.deepest} frames of ours at the prox"
    )


if __name__ == "__main__":
    main()
