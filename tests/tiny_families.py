"""Every tested family as a tiny random model built from its configuration, and tokens for it: nothing is downloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from safetensors.torch import load_file
from torch import Tensor, nn

VOCABULARY = 128
POSITIONS = 64
SPREAD = 0.2  # initial weights ten times the usual, so that layers do something

TOKENS = torch.randint(2, VOCABULARY - 2, (4, 24), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"dataset": TOKENS, "num_calibration_samples": 4, "batch_size": 2, "bound_rows": 0}

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_FALCON: dict[str, Any] = {name: value for name, value in _COMMON.items() if name != "intermediate_size"}
GROUPED: dict[str, Any] = _COMMON | {"num_key_value_heads": 2}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "init_std": SPREAD,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # shorter than what the tests read
}
_GEMMA: dict[str, Any] = GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
_GEMMA3: dict[str, Any] = _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: dict[str, Any] = GROUPED | {"num_experts_per_tok": 2}
_LLAMA4: dict[str, Any] = GROUPED | {
    "intermediate_size": 24,  # of experts, in every third layer
    "intermediate_size_mlp": 48,
    "interleave_moe_layer_step": 3,
    "num_local_experts": 4,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "no_rope_layer_interval": 3,
    "attention_chunk_size": 16,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK: dict[str, Any] = _COMMON | _MLA | {
    "num_hidden_layers": 3,  # the first one is dense
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": None,
    "topk_group": None,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], Any]] = {
    "bloom": lambda: t.BloomForCausalLM(
        t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=SPREAD)
    ),
    "deepseek_v2": lambda: t.DeepseekV2ForCausalLM(t.DeepseekV2Config(**DEEPSEEK)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**_FALCON, alibi=True, parallel_attn=True)),
    "falcon, new": lambda: t.FalconForCausalLM(
        t.FalconConfig(
            **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
            new_decoder_architecture=True,
            num_kv_heads=2,
        )
    ),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_GEMMA)),
    "gemma3": lambda: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config=_GEMMA3, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=127)
    ),
    "gemma3_text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_GEMMA3)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=POSITIONS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=SPREAD,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_COMMON)),
    "gpt_neox, sequential": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_COMMON, use_parallel_residual=False)),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**_EXPERTS, num_local_experts=4, head_dim=8, sliding_window=8)
    ),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "llama, 1": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_COMMON)),
    "llama, 3.2": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**GROUPED | {"tie_word_embeddings": True, "rope_scaling": dict(_LLAMA3)})
    ),
    "llama4_text": lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(**_LLAMA4)),
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=t.LlamaConfig(**GROUPED),
            vision_config=t.CLIPVisionConfig(**_VISION),
            image_token_index=127,
            tie_word_embeddings=False,
        )
    ),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=8)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_EXPERTS, num_local_experts=4)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**GROUPED)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**_OPT, word_embed_proj_dim=32)),
    "opt, 350M": lambda: t.OPTForCausalLM(t.OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=8)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=24)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**GROUPED)),
    "stablelm": lambda: t.StableLmForCausalLM(t.StableLmConfig(**GROUPED)),
}
"""By `model_type`, and after a comma a variant."""


def build_family(name: str) -> Any:
    """Always the same weights, always a new model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[name]().eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def shaken(model: Any) -> Any:
    """With vectors, biases and norms, that differ from channel to channel."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):  # experts have a bias each, in one parameter
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()
