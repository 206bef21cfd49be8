"""Tokens a second and perplexity of GGUF files, beside the first one: the table in lab/benchmarks.md.

    pip install llama-cpp-py-sync
    python benchmarks/speed_gguf.py DENSE.gguf Q4K.gguf [...] --model DENSE --text test.txt

llama.cpp generates with each file in turns, on one thread, and reads the same windows, whose tokens are those of the model's tokenizer.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import median

import torch
from run_gguf import FFI, LLAMA, LlamaCpp, silent, surprise

from convexprune.adapters import load, text_windows
from convexprune.validation._texts import text_of
from convexprune.validation._timing import time_in_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--model", required=True, help="the folder whose tokenizer reads the text")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32, help="to generate, after 16")
    parser.add_argument("--seconds", type=float, default=120, help="to time all files")
    asked = parser.parse_args()
    LLAMA.llama_log_set(silent, FFI.NULL)
    LLAMA.llama_backend_init()
    every = text_windows(text_of(asked.text), load(asked.model, device="cpu"), asked.length)
    windows = every[:: max(1, len(every) // asked.windows)][: asked.windows]
    prompt, files = windows[0, :16].tolist(), {path.name: LlamaCpp(path, asked.length) for path in asked.files}
    runs = {name: partial(file.generate, prompt, asked.tokens) for name, file in files.items()}
    seconds = time_in_turns(runs, "cpu", asked.seconds)
    print(
        f"{len(seconds[asked.files[0].name])} rounds, one thread\n\n| file | MB | tokens/s | time over the first | perplexity |"
    )
    print("|---|---|---|---|---|")
    for path in asked.files:
        own, first = seconds[path.name], seconds[asked.files[0].name]
        rate, ratio = (asked.tokens + len(prompt)) / median(own), median(a / b for a, b in zip(own, first, strict=True))
        loss = torch.cat([surprise(files[path.name].logits(window), window) for window in windows]).mean()
        print(
            f"| {path.name} | {path.stat().st_size / 1e6:.0f} | {rate:.1f} | {ratio:.2f} | {loss.exp():.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
