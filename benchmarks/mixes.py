"""Whole GGUF files of one size: llama.cpp's own mixes with an importance matrix, AutoRound's, and ours by `target`.

    pip install llama-cpp-py-sync gguf            # and auto-round, for the rows of AutoRound
    python benchmarks/mixes.py MODEL --dataset TEXT --eval-text TEXT [TEXT ...] [--mixes Q4_K_M Q3_K_M Q2_K]
        [--by llama.cpp ours auto-round:200] [--keep FOLDER]

MODEL is the folder of a LLaMA or a Qwen. TEXT is a file, python-docs or licences. llama.cpp quantizes the exported dense
file (`llama_model_quantize`), with the mean squares of each operator's inputs on the calibration tokens as its importance
matrix. `convexprune.prune(target=BYTES)` makes a file of at most as many bytes from the same tokens. AutoRound trains
the rounding, so many steps for a layer on the same tokens (200 is its default, 50 its light recipe). transformers reads
all files back. KL is that from the dense model, in nats a token. With FOLDER the files are kept, and a run that was
interrupted goes on there; its seconds are those of the last call.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from imatrix import divergence, importances, spread
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import convexprune
from convexprune.adapters import load

FFI: Any = get_ffi()
LLAMA: Any = get_lib()
MIXES = {name.removeprefix("MOSTLY_"): int(number) for name, number in gguf.LlamaFileType.__members__.items()}


def by_llama_cpp(dense: Path, path: Path, mix: str, importance: dict[str, Tensor], layers: int) -> None:
    """Let llama.cpp write a file in one of its mixes."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    data = FFI.new("struct llama_model_imatrix_data[]", len(importance) + 1)  # the last is empty: the end
    kept = []
    for entry, (name, values) in zip(data, importance.items(), strict=False):
        values = values.float().contiguous()
        kept += [values, FFI.new("char[]", f"{names.get_name(name)}.weight".encode())]
        entry.name, entry.data, entry.size = kept[-1], FFI.cast("float *", values.data_ptr()), values.numel()
    asked = FFI.new("llama_model_quantize_params *", LLAMA.llama_model_quantize_default_params())
    asked.ftype, asked.nthread, asked.imatrix = MIXES[mix], 1, data
    if LLAMA.llama_model_quantize(str(dense).encode(), str(path).encode(), asked):
        raise SystemExit(f"llama.cpp does not write {mix}.")


def by_us(model: str, tokens: Tensor, path: Path, size: int) -> None:
    """Write a file of at most a size."""
    run = path.with_suffix("")
    samples: dict[str, Any] = {"num_calibration_samples": len(tokens), "held_out_samples": 0, "resume": True}
    convexprune.prune(model, dataset=tokens, target=size, evaluation=None, output_dir=run, **samples)
    convexprune.export(run, path, format="gguf")


def by_auto_round(steps: int, model: str, tokens: Tensor, path: Path, mix: str) -> None:
    """Let AutoRound train the rounding and write a file."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]

    kind, folder = f"gguf:{mix.lower()}", path.with_suffix("")
    data = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in tokens]
    sizes: dict[str, Any] = {"nsamples": len(tokens), "seqlen": tokens.shape[1], "iters": steps}
    rounding = AutoRound(model, scheme=kind, dataset=data, device_map="cpu", enable_torch_compile=False, **sizes)
    rounding.quantize_and_save(str(folder), format=kind)
    (found,) = folder.rglob("*.gguf")
    found.rename(path)


def read(path: Path) -> nn.Module:
    """Return the model of a file as transformers reads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def counted(path: Path) -> str:
    """Return the types of a file's matrices, with the number of each."""
    types = [tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1]
    return " ".join(f"{types.count(kind)} {kind}" for kind in sorted(set(types)))


def main() -> None:
    """Print the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval-text", nargs="+", required=True)
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"], choices=MIXES)
    parser.add_argument("--by", nargs="+", default=["llama.cpp", "ours"], help="the first makes the size for ours")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=8, help="of each text to evaluate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", metavar="FOLDER", help="of the files, which are deleted without")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    loaded = load(asked.model, device="cpu", dtype=torch.float32)
    tokens = spread(asked.dataset, loaded, asked.length, asked.samples)
    texts = {text: spread(text, loaded, asked.length, asked.windows) for text in asked.eval_text}
    names = [f"{layer.name}.{operator.name}" for layer in loaded.layers for operator in layer.operators]
    weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    importance = importances(loaded.model, names, tokens)
    print(f"| mix | by | bytes | bits | KL: {' / '.join(Path(t).name for t in texts)} | tensors | s |")
    print("|---|---|---|---|---|---|---|")
    with nullcontext(asked.keep) if asked.keep else TemporaryDirectory() as folder:
        dense, sizes = Path(folder) / "dense.gguf", dict[str, int]()
        if not dense.exists():
            convexprune.export(asked.model, dense, format="gguf")
        for mix in asked.mixes:
            for by in asked.by:
                path, began = Path(folder) / f"{mix}-{by.replace(':', '-')}.gguf", time.perf_counter()
                part = path.with_suffix(".part")
                write: dict[str, Callable[[], None]] = {
                    "llama.cpp": partial(by_llama_cpp, dense, part, mix, importance, len(loaded.layers)),
                    "ours": partial(by_us, asked.model, tokens, part, sizes.get(mix, 0)),
                    "auto-round": partial(
                        by_auto_round, int(by.partition(":")[2] or 200), asked.model, tokens, part, mix
                    ),
                }
                if not path.exists():
                    write[by.partition(":")[0]]()
                    part.rename(path)
                sizes.setdefault(mix, path.stat().st_size)
                seconds, size, model = time.perf_counter() - began, path.stat().st_size, read(path)
                found = [divergence(loaded.model, model, windows) for windows in texts.values()]
                figures = f"{size:,} | {8 * size / weights:.2f} | {' / '.join(f'{v:.4f}' for v in found)}"
                print(f"| {mix} | {by} | {figures} | {counted(path)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
