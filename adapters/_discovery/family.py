"""Decoder layers and sizes of a model of transformers, by its configuration; and the tested families."""

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig, PreTrainedModel

from convexprune.errors import ModelError

from .experts import fused_parameters
from .operators import LINEAR_MODULES

NO_LIMIT = 2**31
"""The positions of a model that has no table of them (ALiBi) and names no limit."""

TESTED = {
    "bloom": "BLOOM",
    "deepseek_v2": "DeepSeek-V2",
    "falcon": "Falcon",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, with its vision tower",
    "gemma3_text": "Gemma 3",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gpt_oss": "GPT-OSS",
    "llama": "LLaMA 1, 2, 3",
    "llama4_text": "LLaMA 4",
    "llava": "LLaVA",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmo2": "OLMo 2",
    "opt": "OPT",
    "phi3": "Phi-3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM",
}
"""The families that the tests prune, save and load, by the `model_type` of their configuration. Nothing depends on it:
whatever the layers of another decoder do is found in the same way, by watching them."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the decoder layers: the outermost list of modules with linear maps that is as long as configured."""
    _refuse_encoders(model)
    decoder = model.get_decoder()
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and _holds_operators(m)}
    outermost = {p: m for p, m in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
    inside = {id(m) for m in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    found = {p: m for p, m in outermost.items() if id(m) in inside} or outermost
    length = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = {p: m for p, m in found.items() if len(m) == length} or found
    if len(found) != 1:
        listed = ", ".join(f"{path} ({len(m)} modules)" for path, m in found.items()) or "none"
        raise ModelError(
            f"Which are the decoder layers of {type(model).__name__}? Lists of modules with linear maps: {listed}. "
            f"One of {length}, as many as num_hidden_layers in its configuration, is needed."
        )
    ((path, layers),) = found.items()
    _refuse_repeated(path, layers)
    return path, layers


def refuse_more_layers(model: PreTrainedModel, stored: Iterable[str]) -> None:
    """Refuse names of tensors in decoder layers that the configuration does not count: nothing would prune them."""
    path, layers = decoder_layers(model)
    ahead = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0  # transformers skips them
    further = f"{path}.{len(layers) + ahead}."
    if found := [n for n in stored if n.startswith((further, further.removeprefix(f"{model.base_model_prefix}.")))]:
        raise ModelError(
            f"{model.name_or_path}: config.json counts {len(layers):,} decoder layers, and there is {min(found)}. "
            "Correct num_hidden_layers, or copy or download both again."
        )


def _refuse_encoders(model: PreTrainedModel) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} has an encoder beside its decoder; convexprune prunes models that only decode."
        )
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder: its tokens see those behind them. convexprune prunes models that "
            "only decode; one of this family does if its configuration has is_decoder=True."
        )


def _refuse_repeated(path: str, layers: nn.ModuleList) -> None:
    first: dict[int, int] = {}
    for number, layer in enumerate(layers):
        if first.setdefault(id(layer), number) < number:
            raise ModelError(
                f"{path}.{first[id(layer)]} and {path}.{number} are one module that runs twice: they cannot be pruned "
                "one by one. Give the model a copy in its place (copy.deepcopy), which is then pruned apart."
            )


def _holds_operators(layers: nn.ModuleList) -> bool:
    return len(layers) > 0 and all(
        any(isinstance(m, LINEAR_MODULES) or fused_parameters(m) for m in layer.modules()) for layer in layers
    )


def positions(config: PretrainedConfig) -> int:
    """Return the largest number of tokens that a model with this configuration accepts."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
    limits = [limit for name in names if isinstance(limit := getattr(text, name, None), int) and limit > 0]
    return limits[0] if limits else NO_LIMIT


def vocabulary(model: PreTrainedModel) -> int:
    """Return the size of a model's vocabulary: token ids run from 0 to one less."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    return len(embedding)


def head_size(config: PretrainedConfig) -> int:
    """Return the channels of an attention head; for a model without heads, the hidden size."""
    text = config.get_text_config()
    named = getattr(text, "v_head_dim", None) or getattr(text, "head_dim", None)
    heads = getattr(text, "num_attention_heads", 1)
    return named or text.hidden_size // (heads if isinstance(heads, int) else 1)  # some name them layer by layer
