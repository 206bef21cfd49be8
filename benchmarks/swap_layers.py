"""Layers of one result in another, to see what single layers cost.

    python benchmarks/swap_layers.py DIR OTHER OUTPUT LAYER [LAYER ...]

OUTPUT is the model in DIR, but for the decoder layers of these numbers, from 0, which are those of the model in OTHER. So
with the dense model as DIR and a result as OTHER `convexprune eval OUTPUT --against DIR` measures these layers alone.
"""

import argparse

import torch

from convexprune.adapters import load, save


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "other", "output"):
        parser.add_argument(name)
    parser.add_argument("layers", type=int, nargs="+")
    asked = parser.parse_args()
    model, other = (load(each, device="cpu") for each in (asked.folder, asked.other))
    for number in asked.layers:
        model.layers[number].module.load_state_dict(other.layers[number].module.state_dict())
    save(model, asked.output)


if __name__ == "__main__":
    main()
