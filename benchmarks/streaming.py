"""Peak memory and time per layer of pruning a LLaMA-shaped model that is larger than the memory it is given.

python benchmarks/streaming.py make FOLDER            # 1.6 billion random parameters in bf16, in shards
python benchmarks/streaming.py prune FOLDER OUTPUT    # in a process of its own, whose peak memory is measured
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

CONFIG = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 120, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
LAYERS_A_SHARD = 30


def make(folder: Path, layers: int) -> None:
    from convexprune._storage.files import write_json
    from convexprune._storage.tensors import Spec, write_tensors
    from convexprune.adapters._checkpoints.reading import parameters_on_meta

    shape: dict[str, Any] = CONFIG | {"num_hidden_layers": layers}
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with parameters_on_meta():
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    del state["lm_head.weight"]
    random = torch.Generator().manual_seed(0)

    def weight(name: str) -> torch.Tensor:
        like = state[name]
        if like.dim() == 1:
            return torch.ones(like.shape, dtype=like.dtype)
        return torch.empty(like.shape, dtype=like.dtype).normal_(0, 0.02, generator=random)

    shards: dict[str, list[str]] = {}
    for name in state:
        layer = int(name.split(".")[2]) // LAYERS_A_SHARD if ".layers." in name else 0
        shards.setdefault(f"model-{layer + 1:05d}.safetensors", []).append(name)
    for file, names in shards.items():
        write_tensors(folder / file, {n: Spec.of(state[n]) for n in names}, weight, {"format": "pt"})
    places = {n: file for file, names in shards.items() for n in names}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    print(f"{sum(t.numel() for t in state.values()) / 1e9:.2f} billion parameters, {size(folder) / 2**20:.0f} MiB")


def prune(folder: Path, output: Path, method: str, samples: int, length: int) -> None:
    import convexprune

    tokens = torch.randint(CONFIG["vocab_size"], (samples + 1, length), generator=torch.Generator().manual_seed(1))
    baseline = peak()
    ends = [time.process_time()]  # of this process: others on the machine do not count

    def on_progress(event: convexprune.Event) -> None:
        if event.report is not None and event.report.name.endswith("down_proj"):
            ends.append(time.process_time())

    result = convexprune.prune(
        folder, method=method, dataset=tokens, num_calibration_samples=samples, threads=1, output_dir=output,
        on_progress=on_progress,
    )  # fmt: skip
    laps = [after - before for before, after in pairwise(ends[1:])]
    quarter = len(laps) // 4
    row = {
        "method": method, "tokens": f"{samples} x {length}", "sparsity": result.report.sparsity,
        "size_MiB": size(folder) / 2**20, "imports_MiB": baseline / 2**20, "peak_MiB": peak() / 2**20,
        "seconds": result.report.seconds,
        "cpu_seconds_a_layer": {
            "median": statistics.median(laps), "first quarter": statistics.median(laps[:quarter]),
            "last quarter": statistics.median(laps[-quarter:]),
        },
    }  # fmt: skip
    print(json.dumps(row, indent=1))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "prune", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.layers)
    elif args.what == "measure":
        prune(args.folder, args.output, args.method, args.samples, args.length)
    else:  # a process of its own, because peak memory never falls
        command = [sys.executable, __file__, "measure", *sys.argv[2:]]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
