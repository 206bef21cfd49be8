"""Print the table of docs/models.md: the memory that known models need, by `inspect`, from configurations alone.

python benchmarks/known_models.py
"""

import tempfile
from typing import Any

from transformers import AutoConfig

import convexprune

GQA = {"num_attention_heads": 32, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "OPT-125M": {"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "word_embed_proj_dim": 768},
    "OPT-6.7B": {"model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32, "word_embed_proj_dim": 4096},
    "Llama-2-7B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "Llama-3.2-1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256, "tie_word_embeddings": True} | GQA,
    "Llama-3.1-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256} | GQA,
    "Llama-3.1-70B": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256} | GQA | {"num_attention_heads": 64},
    "Mistral-7B": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32768} | GQA,
    "Qwen2.5-7B": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "Qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen3-4B": {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True} | GQA,
    "Qwen3-30B-A3B": {"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936},
    "Gemma-3-1B": {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144},
    "Phi-4": {"model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "pad_token_id": 0},
    "SmolLM3-3B": {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256},
}  # fmt: skip


def main() -> None:
    """Print a row for each model."""
    print("| model | weights to prune | GPU memory | or CPU memory | disk |\n| --- | --: | --: | --: | --: |")
    for name, sizes in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model(**sizes, dtype="bfloat16").save_pretrained(folder)
            found = convexprune.inspect(f"{folder}/config.json")
        memory = " | ".join(f"{n / 2**30:.1f} GiB" for n in (found.memory.device, found.memory.all, found.memory.disk))
        print(f"| {name} | {found.weights / 1e9:.2f} G | {memory} |", flush=True)


if __name__ == "__main__":
    main()
