"""A whole decoder layer by shape: seconds of forward passes, Gram matrices and solves, and the peak of memory.

    python benchmarks/layer.py --shape 125M --samples 8 --length 512
    python benchmarks/layer.py --shape 70B --device cuda --samples 128 --length 2048 --dtype bfloat16

Weights are random; what enters the layer has the spectrum of a language model's hidden states: eigenvalues that fall as
1 / j in a random basis, and channels whose scales are log-normal. `x product` is the time of solving over that of the bare
products that the pruner counts, at the rate of such a product, timed just before.
"""

import argparse
from pathlib import Path

import torch
from phases import medians, phases, report
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.pipeline import Pipeline
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerCalls
from convexprune._layerwise.work import layer_steps
from convexprune._runs.cost import measured_speed
from convexprune.adapters import HuggingFaceModel
from convexprune.recipe import make_recipe
from convexprune.report import OperatorReport
from convexprune.validation._timing import peak_memory

SHAPES = {  # hidden size, intermediate size, heads, key and value heads: OPT-125M's, LLaMA 3.2 1B's, LLaMA 2's
    "125M": (768, 3072, 12, 12),
    "1B": (2048, 8192, 32, 8),
    "7B": (4096, 11008, 32, 32),
    "70B": (8192, 28672, 64, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="125M")
    parser.add_argument("--methods", default="convex,admm,sparsegpt,wanda")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for shape in SHAPES if args.shape == "all" else [args.shape]:
        for method in args.methods.split(","):
            runs = [run(shape, method, args) for _ in range(args.repeats)]
            rows.append({"shape": shape, "method": method, **medians(runs)})
            print(rows[-1], flush=True)
    report(rows, args.device, args.output, tokens=f"{args.samples} + 1 held out x {args.length}", repeats=args.repeats)


@torch.no_grad()
def run(shape: str, method: str, args: argparse.Namespace) -> dict[str, float]:
    """Prune the layer once, as a new one."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    model = HuggingFaceModel(build(shape, args.length).to(device, dtype), name=shape)  # pyright: ignore[reportArgumentType]
    hidden = [entering(SHAPES[shape][0], args.length, i).to(device, dtype) for i in range(args.samples + 1)]
    tokens = torch.zeros(1, args.length, dtype=torch.long)
    recipe = make_recipe(model=shape, method=method)
    settings = recipe.layer_settings()
    context = LayerContext(model=model, number=0, layer=model.layers[0], calls=LayerCalls(model, [tokens]).of(0),
                           inputs={"dense": hidden}, states=MemoryStore([0]), held_out=1)  # fmt: skip
    speed, reports = measured_speed(device, dtype), list[OperatorReport]()
    with peak_memory(device) as peak, phases(args.device) as seconds:
        Pipeline(settings, layer_steps(settings, reports.append))(context)
    stacks = {r.name: 2 * r.products * r.outputs * r.inputs**2 for r in reports}
    bare = sum(stacks.values()) / speed.single
    seconds["x product"] = seconds["solve"] / bare if bare else float("nan")
    seconds["GFLOP/s"] = speed.single / 1e9
    seconds["peak GiB"] = (peak.more or 0) / 2**30
    return seconds


def build(shape: str, length: int) -> LlamaForCausalLM:
    hidden, inner, heads, shared = SHAPES[shape]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads,
            num_key_value_heads=shared, max_position_embeddings=length,
        )
    ).eval()  # fmt: skip


def entering(width: int, length: int, seed: int) -> Tensor:
    """Hidden states [1 length width]; the basis and the scales are the same for all seeds."""
    fixed = torch.Generator().manual_seed(1234)
    basis = torch.linalg.qr(torch.randn(width, width, generator=fixed)).Q
    scales = torch.randn(width, generator=fixed).exp()
    z = torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
    return ((z * torch.arange(1, width + 1).rsqrt()) @ basis * scales * width**0.5)[None]


if __name__ == "__main__":
    main()
