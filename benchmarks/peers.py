"""Wall time and peak memory beside llm-compressor's SparseGPT at 50 %, on the same tokens, runs interleaved.

    python benchmarks/peers.py MODEL --dataset text.txt --peer PYTHON

PYTHON is the interpreter of an environment with llmcompressor 0.14. Every run is a process of its own that loads the
model in float32, prunes it on the CPU and saves it; importing is not timed, loading and saving are.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset")
    parser.add_argument("--peer", help="interpreter of the environment with llmcompressor")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(RUNS[args.run](args.model, args.folder)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.save(tokens(args.model, args.dataset, args.samples, args.length), folder / "tokens.pt")
        for repeat in range(args.repeats):
            for name, interpreter in (("convexprune", sys.executable), ("llmcompressor", args.peer)):
                command = [interpreter, __file__, args.model, "--run", name, "--folder", str(folder)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results[name].append(json.loads(output.splitlines()[-1]))
                print(repeat, name, results[name][-1], flush=True)
    pairs = zip(*results.values(), strict=True)
    ratios = [{key: ours[key] / theirs[key] for key in ours} for ours, theirs in pairs]
    summary = {key: statistics.median(r[key] for r in ratios) for key in ratios[0]}
    print("median ratio, convexprune / llmcompressor:", summary)
    if args.output:
        args.output.write_text(json.dumps({"runs": results, "ratios": ratios, "median": summary}, indent=2))


def tokens(model: str, dataset: str, samples: int, length: int) -> torch.Tensor:
    from convexprune.adapters import calibration_and_held_out, load

    loaded = load(model, device="cpu")
    return calibration_and_held_out(dataset, loaded, num_samples=samples, max_seq_length=length, seed=0)[0]


def convexprune(model: str, folder: Path) -> dict[str, float]:
    from convexprune._api.calls import prune

    windows = torch.load(folder / "tokens.pt")
    output = tempfile.mkdtemp(dir=folder)
    return timed(
        lambda: prune(
            model, dataset=windows, num_calibration_samples=len(windows), dtype="float32", output_dir=f"{output}/out"
        )
    )


def llmcompressor(model: str, folder: Path) -> dict[str, float]:
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.pruning import SparseGPTModifier  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    windows = torch.load(folder / "tokens.pt")
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    recipe = SparseGPTModifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"])

    def run() -> None:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        settings = {"max_seq_length": windows.shape[1], "num_calibration_samples": len(windows)}
        oneshot(model=loaded, dataset=data, recipe=recipe, **settings)
        loaded.save_pretrained(tempfile.mkdtemp(dir=folder))

    return timed(run)


def timed(run: Callable[[], object]) -> dict[str, float]:
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


RUNS: dict[str, Callable[[str, Path], dict[str, float]]] = {"convexprune": convexprune, "llmcompressor": llmcompressor}

if __name__ == "__main__":
    main()
