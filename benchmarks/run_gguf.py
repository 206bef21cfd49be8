"""The tables of docs/channels.md, section GGUF: a smaller model converted and run by llama.cpp, beside transformers.

    pip install llama-cpp-py-sync sentencepiece                 # llama.cpp as a library
    pip download --no-deps --no-binary :all: llama-cpp-python   # its sdist has the stock converter: unpack it
    python benchmarks/run_gguf.py DENSE SMALLER --llama-cpp llama_cpp_python-*/vendor/llama.cpp --text test.txt

Both folders are converted to GGUF in float32, and quantized by llama.cpp. Each file predicts the same windows of the
text, from the same token ids, as transformers does with the folder. Both models generate in turns on one thread.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # pyright: ignore[reportMissingImports]
from torch import Tensor

from convexprune.adapters import HuggingFaceModel, load, text_windows
from convexprune.validation._timing import time_in_turns

TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_K_M": 15}  # of llama.h
FFI: Any = get_ffi()  # whether or not the type checker sees the package
LLAMA: Any = get_lib()


@FFI.callback("void(enum ggml_log_level, const char *, void *)")
def silent(level: Any, text: Any, data: Any) -> None:
    """What llama.cpp says of each tensor is of no interest here."""


class LlamaCpp:
    """A GGUF file, loaded by llama.cpp."""

    def __init__(self, path: Path, tokens: int) -> None:
        self._model = LLAMA.llama_model_load_from_file(str(path).encode(), LLAMA.llama_model_default_params())
        asked = LLAMA.llama_context_default_params()
        asked.n_ctx = asked.n_batch = asked.n_ubatch = tokens
        asked.n_threads = asked.n_threads_batch = 1
        self._context = LLAMA.llama_init_from_model(self._model, asked)
        if self._context == FFI.NULL:
            raise SystemExit(f"{path}: llama.cpp cannot load it.")
        self._words = LLAMA.llama_vocab_n_tokens(LLAMA.llama_model_get_vocab(self._model))

    def restart(self) -> None:
        LLAMA.llama_memory_clear(LLAMA.llama_get_memory(self._context), True)

    def step(self, token: int) -> int:
        """The likeliest token after another one."""
        ids = FFI.new("llama_token[]", [token])
        assert LLAMA.llama_decode(self._context, LLAMA.llama_batch_get_one(ids, 1)) == 0
        return int(self._row(0).argmax())

    def generate(self, prompt: list[int], count: int) -> list[int]:
        self.restart()
        found = [self.step(token) for token in prompt][-1:]
        while len(found) < count:
            found.append(self.step(found[-1]))
        return found

    def logits(self, window: Tensor) -> Tensor:
        """Those of each position [tokens words] of a window [tokens]."""
        self.restart()
        batch = LLAMA.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert LLAMA.llama_decode(self._context, batch) == 0
        LLAMA.llama_batch_free(batch)
        return torch.stack([self._row(i) for i in range(len(window))])

    def _row(self, i: int) -> Tensor:
        pointer = LLAMA.llama_get_logits_ith(self._context, i)
        return torch.frombuffer(FFI.buffer(pointer, 4 * self._words), dtype=torch.float32).clone()


def converted(model: Path, llama_cpp: Path, folder: Path, name: str) -> Path:
    """A folder of transformers as a GGUF file in another type, by the stock tools."""
    whole = folder / f"{model.name}-F32.gguf"
    if not whole.exists():
        command = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", model, "--outfile", whole, "--outtype", "f32"]
        subprocess.run(
            command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": f"{llama_cpp}/gguf-py"}
        )
    path = whole.with_name(f"{model.name}-{name}.gguf")
    if not path.exists():
        asked = FFI.new("llama_model_quantize_params *", LLAMA.llama_model_quantize_default_params())
        asked.ftype, asked.nthread = TYPES[name], 1
        assert LLAMA.llama_model_quantize(str(whole).encode(), str(path).encode(), asked) == 0
    return path


def surprise(logits: Tensor, window: Tensor) -> Tensor:
    """-log p of each token but the first [tokens - 1]."""
    return torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:], reduction="none")


def compared(file: LlamaCpp, model: HuggingFaceModel, windows: Tensor) -> dict[str, float]:
    """Perplexities of both, and how far their logits are apart in the root mean square, relative to their spread."""
    theirs, ours, apart = [], [], []
    for window in windows:
        there, here = file.logits(window), model.model(window[None]).logits[0].float()
        theirs.append(surprise(there, window))
        ours.append(surprise(here, window))
        apart.append((there - here).square().mean() / (here - here.mean(-1, keepdim=True)).square().mean())
    figures = {"llama.cpp": torch.cat(theirs).mean().exp(), "transformers": torch.cat(ours).mean().exp()}
    return {name: round(float(x), 3) for name, x in figures.items()} | {
        "apart": float(torch.stack(apart).mean().sqrt())
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("smaller", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="the folder with convert_hf_to_gguf.py")
    parser.add_argument("--text", required=True)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48, help="to generate")
    parser.add_argument("--seconds", type=float, default=60, help="to time one type")
    parser.add_argument("--folder", type=Path, default=Path(), help="for the GGUF files")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    LLAMA.llama_log_set(silent, FFI.NULL)
    LLAMA.llama_backend_init()
    folders = (asked.dense, asked.smaller)
    models = {folder: load(folder, device="cpu", dtype=torch.float32) for folder in folders}
    every = text_windows(asked.text, models[asked.dense], asked.length)
    windows = every[:: max(1, len(every) // asked.windows)][: asked.windows]
    prompt, tokenizer = windows[0, :16].tolist(), models[asked.dense].tokenizer
    assert tokenizer is not None
    for name in asked.types:
        paths = {folder: converted(folder, asked.llama_cpp, asked.folder, name) for folder in folders}
        files = {folder: LlamaCpp(path, asked.length) for folder, path in paths.items()}
        runs = {str(folder): partial(file.generate, prompt, asked.tokens) for folder, file in files.items()}
        seconds = time_in_turns(runs, "cpu", asked.seconds)
        pairs = zip(*seconds.values(), strict=True)
        for folder, file in files.items():
            rate = (asked.tokens + len(prompt)) / median(seconds[str(folder)])
            row = {"model": folder.name, "type": name, "MB": round(paths[folder].stat().st_size / 1e6, 1)}
            row |= compared(file, models[folder], windows) | {"tokens/s": round(rate, 2)}
            print(row, flush=True)
        print(
            f"{name}: time of the smaller over dense {median(b / a for a, b in pairs):.3f}, {len(seconds[str(asked.dense)])} rounds"
        )
        print(repr(tokenizer.decode(prompt + files[asked.smaller].generate(prompt, 32))), flush=True)


if __name__ == "__main__":
    main()
