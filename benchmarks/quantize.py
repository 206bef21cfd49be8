"""Perplexity and divergence from dense against bits a weight: quantizers, with and without zeros, each packed and counted.

    python benchmarks/quantize.py MODEL --dataset TEXT --eval-text TEXT [TEXT ...] [--only NAME ...] > lines.md
    python benchmarks/quantize.py --draw lines.md --picture quantize.png

MODEL is a folder, or `bundled`. TEXT is a file or a name of `convexprune compare --eval-texts`. The second command draws the
lines of the first. Weights are computed in float32 and stored in bfloat16; what is stored is judged. Bits are those of the
packed operators: masks, scales and entropy codes are counted. MB are those of all files of the pack, embeddings too. A line is
printed when it is there, so that a stopped run leaves its lines.

A LLaMA that was stored in 4 bits has to be rescaled first (`benchmarks/gauge.py`).
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
from convexprune.adapters import EMBEDDED
from convexprune.validation._texts import text_of

OWN: dict[str, Any] = {"error_correction": 0, "prefix": "pruned"}  # GPTQ's convention
KINDS: dict[str, dict[str, Any]] = {
    "rtn": {"sparsity": 0, "quantizer": "rtn", "error_correction": 0, "num_calibration_samples": 2},
    "gptq": {"sparsity": 0, "quantizer": "gptq", "allocation": "uniform", **OWN},
    "gptq, our shares": {"sparsity": 0, "quantizer": "gptq", **OWN},
    "gptaq": {"sparsity": 0, "quantizer": "gptaq"},
    "qep": {"sparsity": 0, "quantizer": "qep"},
    "ours": {"sparsity": 0},
    "ours, no beam": {"sparsity": 0, "quantizer_args": {"beam": 1}},
    "ours uniform": {"sparsity": 0, "allocation": "uniform"},
    "ours 25%": {"sparsity": 0.25},
    "ours 50%": {"sparsity": 0.5},
}
FEW, CODED = ("int4", "int3"), (4, 3.3, 3, 2.5, 2)
NUMBERS: dict[str, tuple[str | float, ...]] = {
    "rtn": ("int8", *FEW),
    "gptq": ("int8", *FEW, *CODED),
    "gptq, our shares": (3.3, 2.5),
    "gptaq": FEW,
    "qep": FEW,
    "ours": ("int8", *FEW, *CODED),
    "ours, no beam": FEW,
    "ours uniform": (3.3, 2.5),
    "ours 25%": ("int4",),
    "ours 50%": ("int6", "int4"),
}
ALL = [f"{kind} {number}" for kind, numbers in NUMBERS.items() for number in numbers]
MOST = 6  # bits, of a drawing: with more, all are near the dense model


Windows = dict[str, torch.Tensor]
Dense = dict[str, list[torch.Tensor]]


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
    """Return the bits a weight of the packed operators; `sizes` says how many weights each has."""
    found = {name: entry for path in pack.glob("*.pack.safetensors") for name, entry in entries(path)[0].items()}
    return 8 * sum(found[f"{name}.weight"].spec.nbytes for name in sizes) / sum(sizes.values())


def draw(lines: Path, picture: Path) -> None:
    """Draw divergence against up to `MOST` bits, a panel for each text: points of one kind are joined."""
    import matplotlib.pyplot as plt

    cells = [line.strip("| \n").split(" | ") for line in lines.read_text().splitlines() if line.count(" | ") == 6]
    texts = cells[0][4].removeprefix("KL, nats: ").split(" / ")
    figure = plt.figure(figsize=(3 + 4 * len(texts), 4), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for number, (text, axes) in enumerate(zip(texts, panels, strict=True)):
        kinds: dict[str, list[tuple[float, float]]] = {}
        for name, bits, _, _, divergence, *_ in (each for each in cells[1:] if float(each[1]) <= MOST):
            kind, _, numbers = name.rpartition(" ")
            kind = f"{kind} --quantize" if numbers.startswith("int") else f"{kind} --bits"
            kinds.setdefault(kind, []).append((float(bits), float(divergence.split(" / ")[number])))
        for kind, points in kinds.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=kind)
        axes.set(title=text, xlabel="bits a weight, packed, everything counted", yscale="log")
        axes.grid(alpha=0.3, which="both")
    panels[0].set(ylabel="KL from dense, nats a token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(str(picture), dpi=100)


def line_of(name: str, model: str | None, shared: dict[str, Any], windows: Windows, dense: Dense) -> str:
    """Quantize, pack, and measure: a line of the table."""
    kind, _, bits = name.rpartition(" ")
    numbers: dict[str, Any] = {"quantize": bits} if bits.startswith("int") else {"bits": float(bits)}
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder, "out"), time.perf_counter()
        result = convexprune.prune(model, **shared | numbers | KINDS[kind])
        report, seconds = result.report, time.perf_counter() - began
        result.model.bfloat16().save_pretrained(out)
        sizes = {o.name: o.outputs * o.inputs for o in report.operators}
        packed = convexprune.pack(out, Path(folder, "pack"))
        size = bits_of(packed.output_dir, sizes)
        pruned = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
        found = [divergences(pruned, windows[text], dense[text])[1:] for text in windows]
    zeros = sum(o.zeros for o in report.operators) / sum(sizes.values())
    perplexities, kls = (
        " / ".join(f"{v:.{places}f}" for v in each)
        for each, places in zip(zip(*found, strict=True), (2, 4), strict=True)
    )
    return f"| {name} | {size:.2f} | {packed.after / 1e6:.1f} | {perplexities} | {kls} | {zeros:.0%} | {seconds:.0f} |"


def main() -> None:
    """Print the table, or draw one that was printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dataset")
    parser.add_argument("--eval-text", nargs="+")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=ALL)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("quantize.png"))
    args = parser.parse_args()
    if args.draw:
        return draw(args.draw, args.picture)
    if not (args.model and args.dataset and args.eval_text):
        parser.error("give MODEL, --dataset and --eval-text, or --draw")
    model = None if args.model == "bundled" else args.model
    place = EMBEDDED if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokens, windows = args.windows * args.length, Windows()
    for text in args.eval_text:
        ids = torch.tensor(tokenizer(text_of(text)[: 16 * tokens])["input_ids"])
        windows[Path(text).stem] = ids[:tokens].view(args.windows, args.length)
    model_before = AutoModelForCausalLM.from_pretrained(place, dtype="float32")
    found = {text: divergences(model_before, each, None) for text, each in windows.items()}
    dense, texts = {text: each[0] for text, each in found.items()}, " / ".join(windows)
    print(f"dense: perplexity {' / '.join(f'{each[1]:.2f}' for each in found.values())}\n")
    print(f"| weights | bits | MB | perplexity: {texts} | KL, nats: {texts} | zeros | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    shared = {"dataset": args.dataset, "num_calibration_samples": args.samples, "max_seq_length": args.length}
    shared |= {"held_out_samples": 0, "bound_rows": 0, "dtype": "float32"}
    for name in args.only:
        print(line_of(name, model, shared, windows, dense), flush=True)
    return None


if __name__ == "__main__":
    main()
