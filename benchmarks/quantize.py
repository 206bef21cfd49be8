"""Perplexity and divergence from dense against bits a weight: quantizers, with and without zeros, each packed and counted.

    python benchmarks/quantize.py MODEL --dataset TEXT --eval-text TEXT [--only NAME ...]

MODEL is a folder. Bits are those of the packed operators, everything counted: masks, scales, entropy codes. Each line is
printed when it is there, so that a stopped run leaves its lines.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import convexprune
from convexprune._storage.tensors import entries

OWN: dict[str, Any] = {"error_correction": 0, "prefix": "pruned"}  # GPTQ's convention
BITS = (4.0, 3.5, 3.0, 2.5, 2.0)  # of coded weights
KINDS: dict[str, dict[str, Any]] = {
    "rtn": {"sparsity": 0, "quantizer": "rtn", "error_correction": 0, "num_calibration_samples": 2},
    "gptq": {"sparsity": 0, "quantizer": "gptq", **OWN},
    "gptaq": {"sparsity": 0, "quantizer": "gptq", "prefix": "pruned", "error_correction": 1},
    "qep": {"sparsity": 0, "quantizer": "gptq", "prefix": "pruned", "error_correction": 0.5},
    "ours": {"sparsity": 0},
    "ours uniform": {"sparsity": 0, "allocation": "uniform"},
    "ours 25%": {"sparsity": 0.25},
    "ours 50%": {"sparsity": 0.5},
    "ours 60%": {"sparsity": 0.6},
}
ALL = [(kind, bits) for kind in KINDS for bits in (("int4", "int3") if "%" not in kind else ("int6", "int4", "int3"))]


@torch.no_grad()
def divergences(model: Any, windows: torch.Tensor, dense: list[torch.Tensor] | None) -> tuple[Any, float, float]:
    """Log-probabilities of a model, its perplexity, and the mean KL divergence from dense in nats a token."""
    kept, loss, divergence = list[torch.Tensor](), 0.0, 0.0
    for i, window in enumerate(windows):
        found = model(window[None]).logits[0, :-1].float().log_softmax(-1)
        loss -= float(found.gather(1, window[1:, None]).mean()) / len(windows)
        if dense is None:
            kept.append(found.half())
        else:
            reference = dense[i].float()
            divergence += float((reference.exp() * (reference - found)).sum(-1).mean()) / len(windows)
    return kept, float(torch.tensor(loss).exp()), divergence


def bits_of(pack: Path, sizes: dict[str, int]) -> float:
    """Bits a weight of the packed operators; `sizes` says how many weights each has."""
    found = {name: entry for path in pack.glob("*.pack.safetensors") for name, entry in entries(path)[0].items()}
    return 8 * sum(found[f"{name}.weight"].spec.nbytes for name in sizes) / sum(sizes.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[f"{kind} {bits}" for kind, bits in ALL])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(Path(args.eval_text).read_text()[: 16 * args.windows * args.length])["input_ids"])
    windows = ids[: args.windows * args.length].view(args.windows, args.length)
    dense, perplexity, _ = divergences(AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"), windows, None)
    print(f"dense: perplexity {perplexity:.2f}\n\n| weights | bits | perplexity | KL, nats | zeros | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    shared = {"dataset": args.dataset, "num_calibration_samples": args.samples, "max_seq_length": args.length}
    for name in args.only:
        kind, _, bits = name.rpartition(" ")
        numbers = {"quantize": bits} if bits.startswith("int") else {"bits": float(bits)}
        with tempfile.TemporaryDirectory() as folder:
            out, began = Path(folder, "out"), time.perf_counter()
            settings = shared | {"held_out_samples": 0, "bound_rows": 0, "dtype": "float32"} | KINDS[kind]
            report = convexprune.prune(args.model, output_dir=out, **numbers, **settings).report
            seconds = time.perf_counter() - began
            sizes = {o.name: o.outputs * o.inputs for o in report.operators}
            size = bits_of(convexprune.pack(out, Path(folder, "pack")).output_dir, sizes)
            model = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
            _, perplexity, divergence = divergences(model, windows, dense)
        zeros = sum(o.zeros for o in report.operators) / sum(sizes.values())
        print(
            f"| {name} | {size:.2f} | {perplexity:.2f} | {divergence:.3f} | {zeros:.0%} | {seconds:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
