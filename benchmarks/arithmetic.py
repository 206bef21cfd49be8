"""How long models take on GPUs, by arithmetic: seconds of each phase, bytes, and which resource binds. Nothing is run.

    python benchmarks/arithmetic.py [--method convex] [--samples 128] [--length 2048]

From published peaks times 0.7 (`_runs/resources.py`) and the operators that `inspect` finds in these configurations.
`convexprune doctor` measures the true rates, and `convexprune inspect` uses the same model with them.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from convexprune._runs import cost
from convexprune._runs.resources import CARDS, binding, moved_bytes, needs_of, published, seconds_by_resource
from convexprune.adapters._discovery.needs import setting_of
from convexprune.adapters._discovery.outline import read_outline
from convexprune.recipe import make_recipe

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "max_position_embeddings": 4096,
    "dtype": "bfloat16", "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-2-70B": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B": LLAMA | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="convex")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    print(
        "| model | GPU | forward | Gram | solve: bfloat16 + float32 + float64 + memory + launches | errors | copies (GB) | all | most of it | GiB of the GPU |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, config in MODELS.items():
        recipe = make_recipe(
            model=name, method=args.method, num_calibration_samples=args.samples, max_seq_length=args.length
        )
        with TemporaryDirectory() as folder:
            place = Path(folder) / "config.json"
            place.write_text(json.dumps(config))
            outline = read_outline(place, recipe)
        setting = setting_of(recipe, outline)
        for card in map(published, CARDS):
            phases = seconds_by_resource(outline.size, setting, needs_of(args.method, False), card)
            total = {phase: sum(each.values()) for phase, each in phases.items()}
            parts = " + ".join(f"{seconds:.0f}" for seconds in phases["solve"].values())
            moved = f"{total['copies']:.0f} ({moved_bytes(outline.size, setting) / 1e9:,.0f})"
            cells = (
                name, card.name, f"{total['forward']:.0f}", f"{total['gram']:.0f}", f"{total['solve']:.0f}: {parts}",
                f"{total['errors']:.0f}", moved, f"{sum(total.values()):,.0f} s", binding(phases),
                f"{cost.memory(outline.size, setting).device / 2**30:.1f}",
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
