"""int4 beside GPTQModel's on the same tokens: KL from dense on some texts.

    python benchmarks/int4.py MODEL --peer PYTHON --dataset TEXT --eval-text TEXT [TEXT ...] [--by WAY ...]

MODEL is a folder of float32 or 16 bits. TEXT is a file, python-docs or licences. PYTHON is the interpreter of an
environment with gptqmodel (7.7.0 runs on a CPU). Its defaults are kept: symmetric codes, groups in the order of their
activations, damping of .05. `mse` searches scales besides (norm 2.4, as in GPTQ's code). GPTAQ and FOEM have the constants
that it recommends. What it saves is read back by its own layers. A LLaMA that was stored in 4 bits has to be rescaled
first (`benchmarks/gauge.py`).
"""

import argparse
import os
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PEERS = ("gptq", "mse", "gptaq", "gptaq-mse", "foem")
OF_PEER = {"PYTHONPATH": "", "GPTQMODEL_CPU_WORKERS": "2"}  # it cannot load a model with fewer


def by_gptqmodel(model: str, folder: Path, way: str, group_size: int) -> None:
    """Quantize the operators on the tokens of a folder, and save the values of their codes there; in its environment."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports]
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig  # pyright: ignore[reportMissingImports]

    mse, gptaq = {"mse": 2.4}, {"gptaq": GPTAQConfig()}
    ways = {"gptq": {}, "mse": mse, "gptaq": gptaq, "gptaq-mse": gptaq | mse, "foem": {"foem": FOEMConfig()}}
    config = QuantizeConfig(bits=4, group_size=group_size, device="cpu", **ways[way])
    windows = load_file(folder / "tokens.safetensors")["tokens"]
    data = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in windows]
    quantized = GPTQModel.load(model, config, dtype=torch.float32)
    quantized.quantize(data, batch_size=1)
    quantized.save(str(folder / way))
    found = GPTQModel.load(str(folder / way), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    layers = ((name, m) for name, m in found.named_modules() if hasattr(m, "dequantize_weight"))
    save_file({n: m.dequantize_weight().float().T.contiguous() for n, m in layers}, folder / f"{way}.safetensors")


def compared(asked: argparse.Namespace, folder: Path) -> None:
    """Print the table, a line as soon as it is there."""
    from imatrix import divergence, give, spread, weights_of, with_weights

    import convexprune
    from convexprune.adapters import load

    loaded = load(asked.model, device="cpu", dtype=torch.float32)
    tokens = spread(asked.dataset, loaded, asked.length, asked.samples)
    texts = {text: spread(text, loaded, asked.length, asked.windows) for text in asked.eval_text}
    names = [f"{layer.name}.{operator.name}" for layer in loaded.layers for operator in layer.operators]
    model, dense = loaded.model, weights_of(loaded.model, names)
    save_file({"tokens": tokens.contiguous()}, folder / "tokens.safetensors")
    print(f"| by | KL: {' / '.join(Path(text).name for text in texts)} | s |\n|---|---|---|", flush=True)
    for by in asked.by:
        began = time.perf_counter()
        if by in PEERS:
            command = [asked.peer, __file__, asked.model, "--run", by, "--folder", str(folder)]
            command += ["--group-size", f"{asked.group_size}", "--threads", f"{asked.threads}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | OF_PEER)
            coded = load_file(folder / f"{by}.safetensors")
        else:
            settings: dict[str, Any] = {"quantize": "int4", "group_size": asked.group_size, "sparsity": 0}
            settings |= {"num_calibration_samples": len(tokens), "held_out_samples": 0, "evaluation": None}
            convexprune.prune(model, dataset=tokens, tokenizer=loaded.tokenizer, **settings)
            coded = weights_of(model, names)
            give(model, dense)
        seconds, other = time.perf_counter() - began, with_weights(model, dense, coded)
        found = [divergence(model, other, windows) for windows in texts.values()]
        print(f"| {by} | {' / '.join(f'{v:.4f}' for v in found)} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Read the command line; with --run, in the environment of the peer, be the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer", help="interpreter of the environment with gptqmodel")
    parser.add_argument("--dataset")
    parser.add_argument("--eval-text", nargs="+")
    parser.add_argument("--by", nargs="+", default=[*PEERS, "ours"], choices=(*PEERS, "ours"))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=8, help="of each text to evaluate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.run:
        by_gptqmodel(asked.model, asked.folder, asked.run, asked.group_size)
        return
    if not (asked.dataset and asked.eval_text) or (not asked.peer and {*PEERS} & {*asked.by}):
        parser.error("give --dataset, --eval-text, and for all but ours --peer")
    with TemporaryDirectory() as folder:
        compared(asked, Path(folder))


if __name__ == "__main__":
    main()
