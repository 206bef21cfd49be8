"""Prune a LLaMA to 2:4, two non-zeros in every four weights, and check every group.

python examples/prune_llama.py [FOLDER OR HUB NAME]     (nothing given: a small random LLaMA)
"""

import sys

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import convexprune
from convexprune.adapters import EMBEDDED

TEXT = ["Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little. " * 40]


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


model, tokenizer = (
    (sys.argv[1], None) if len(sys.argv) > 1 else (random_llama(), AutoTokenizer.from_pretrained(EMBEDDED))
)
result = convexprune.prune(
    model, pattern="2:4", tokenizer=tokenizer, dataset=TEXT, num_calibration_samples=8, max_seq_length=64
)
weights = dict(result.model.named_parameters())
for operator in result.report.operators:
    weight = weights[f"{operator.name}.weight"]
    non_zeros = (weight.reshape(-1, 4) != 0).sum(1)
    assert (non_zeros <= 2).all(), operator.name
print(f"{len(result.report.operators)} operators, {result.report.sparsity:.1%} zeros, in every four weights two")
