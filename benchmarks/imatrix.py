"""GGUF's types at the same bytes: codes by llama.cpp with an importance matrix, and by descent on the Gram matrix.

    pip install llama-cpp-py-sync gguf
    python benchmarks/imatrix.py MODEL --dataset TEXT --eval-text TEXT [TEXT ...] [--types q4_k q2_k iq4_nl]

MODEL is a folder, or `bundled`. TEXT is a file, python-docs or licences. llama.cpp's function `ggml_quantize_chunk` quantizes each operator of the
decoder layers, weighed by the mean square of its inputs: that is the importance matrix, here of the tokens that `convexprune.prune` reads, too.
Both fill the same blocks, so the bytes are equal. Embedding and head stay in 16 bits, vectors in 32. KL is that of the values in the blocks from
the dense model, in nats a token. A LLaMA that was stored in 4 bits has to be rescaled first (`benchmarks/gauge.py`).
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

import convexprune
from convexprune.adapters import EMBEDDED, HuggingFaceModel, load, text_windows
from convexprune.constraints import make_grid
from convexprune.validation._texts import text_of

WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, no beam": {"quantizer_args": {"beam": 1}},
    "ours, tokens alike": {"token_weights": "none"},
    "ours, tokens by the loss": {"token_weights": "loss"},
}


def library() -> Any:
    """llama.cpp's library of blocks."""
    found = find_spec("llama_cpp_py_sync")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llama.cpp is not here: pip install llama-cpp-py-sync")
    blocks = ctypes.CDLL(str(Path(found.submodule_search_locations[0]) / "libggml-base.so.0"), mode=ctypes.RTLD_GLOBAL)
    blocks.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointers, sizes = [ctypes.c_void_p] * 2, [ctypes.c_int64] * 3
    blocks.ggml_quantize_chunk.argtypes = [ctypes.c_int, *pointers, *sizes, ctypes.c_void_p]
    return blocks


def by_llama_cpp(blocks: Any, weight: Tensor, importance: Tensor, kind: str) -> Tensor:
    """The values of a weight [m n] as llama.cpp quantizes it, with an importance [n] of its columns."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    count, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weight.shape
    source, by = weight.float().contiguous(), importance.float().contiguous()
    data = torch.zeros(rows, columns // count * size, dtype=torch.uint8)
    blocks.ggml_quantize_init(int(number))
    blocks.ggml_quantize_chunk(int(number), source.data_ptr(), data.data_ptr(), 0, rows, columns, by.data_ptr())
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), number).copy())


@torch.no_grad()
def importances(model: nn.Module, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    """The mean square of each operator's inputs [n]."""
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums[name] + inputs[0].flatten(0, -2).double().square().sum(0)

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    for window in windows:
        model(window[None])
    for hook in hooks:
        hook.remove()
    return {name: total / windows.numel() for name, total in sums.items()}


def weights_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).get_parameter("weight").data.clone() for name in names}


def with_weights(model: nn.Module, dense: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Callable[..., Any]:
    """A model with other weights while it is called: a second model would need as much memory again."""

    def call(tokens: Tensor) -> Any:
        give(model, others)
        found = model(tokens)
        give(model, dense)
        return found

    return call


def give(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_submodule(name).get_parameter("weight").data.copy_(weight)


@torch.no_grad()
def divergence(dense: nn.Module, other: Callable[..., Any], windows: Tensor) -> float:
    """The mean of KL(dense || other) over the tokens of windows, in nats."""
    total = 0.0
    for window in windows:
        reference, found = (model(window[None]).logits[0, :-1].log_softmax(-1) for model in (dense, other))
        total += float((reference.exp() * (reference - found)).sum(-1).double().mean()) / len(windows)
    return total


def spread(text: str, model: HuggingFaceModel, length: int, count: int) -> Tensor:
    """Some windows of a text, at equal distances."""
    every = text_windows(text_of(text), model, length)
    return every[:: max(1, len(every) // count)][:count]


def bits_of(model: nn.Module, names: list[str], bits: float) -> float:
    """Bits a weight of the whole file, but for its header."""
    own = {f"{name}.weight" for name in names}
    sizes = {n: (p.numel(), bits if n in own else 32 if p.dim() == 1 else 16) for n, p in model.named_parameters()}
    return sum(count * each for count, each in sizes.values()) / sum(count for count, _ in sizes.values())


def main() -> None:
    """Print the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval-text", nargs="+", required=True)
    parser.add_argument("--types", nargs="+", default=["q4_k", "q2_k", "iq4_nl"])
    parser.add_argument("--ways", nargs="+", default=["ours"], choices=WAYS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=40, help="of each text to evaluate on")
    parser.add_argument("--every", type=int, default=1, help="4: each fourth layer alone, others stay dense")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    blocks, source = library(), EMBEDDED if asked.model == "bundled" else asked.model
    loaded = load(source, device="cpu", dtype=torch.float32)
    tokens = spread(asked.dataset, loaded, asked.length, asked.samples)
    texts = {text: spread(text, loaded, asked.length, asked.windows) for text in asked.eval_text}
    layers = loaded.layers[:: asked.every]
    names = [f"{layer.name}.{operator.name}" for layer in layers for operator in layer.operators]
    model, seen = loaded.model, importances(loaded.model, names, tokens)
    dense = weights_of(model, names)
    print(f"| type | codes by | bits of operators | of the whole | KL: {' / '.join(Path(t).name for t in texts)} | s |")
    print("|---|---|---|---|---|---|")
    for kind in asked.types:
        for way in ("llama.cpp, imatrix", *asked.ways):
            began = time.perf_counter()
            if way in WAYS:
                settings = {"quantize": kind, "sparsity": 0, "held_out_samples": 0, "evaluation": None} | WAYS[way]
                settings |= {"num_calibration_samples": len(tokens), "targets": names}
                convexprune.prune(model, dataset=tokens, tokenizer=loaded.tokenizer, **settings)
                coded = weights_of(model, names)
                give(model, dense)
            else:
                coded = {name: by_llama_cpp(blocks, dense[name], seen[name], kind) for name in names}
            seconds = time.perf_counter() - began
            other = with_weights(model, dense, coded)
            found = [divergence(model, other, windows) for windows in texts.values()]
            bits: Any = make_grid(kind, 32)
            figures = f"{bits.bits:g} | {bits_of(model, names, bits.bits):.2f}"
            print(
                f"| {kind} | {way} | {figures} | {' / '.join(f'{v:.4f}' for v in found)} | {seconds:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
