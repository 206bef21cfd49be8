"""Refuse GGUF files of which transformers leaves something out when it unpacks them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from convexprune.errors import ModelError


def refuse_left_out(path: Path, model: PreTrainedModel) -> None:
    """Refuse a GGUF file that says more than the model of it: scaled rotary embeddings, or biases."""
    from gguf import GGUFReader  # transformers has needed it, too

    reader = GGUFReader(path)
    scaled, biases = _scaling(reader), {each.name: each for each in reader.tensors if each.name.endswith(".bias")}
    held = sum(p.numel() for part in (model.named_parameters, model.named_buffers) for n, p in part() if "bias" in n)
    lost = f"the scaling of its rotary embeddings ({scaled})" if scaled and not _is_scaled(model.config) else None
    if sum(int(each.n_elements) for each in biases.values()) > held:
        lost = f"biases ({min(biases)})"
    if lost is not None:
        raise ModelError(
            f"{path}: transformers leaves out {lost}, so its model computes something else than llama.cpp. Give the "
            "folder of safetensors that the file was made from."
        )


def _scaling(reader: Any) -> str | None:
    """Return what says in a file that its rotary embeddings are scaled: the name of a tensor or a key."""
    for tensor in reader.tensors:
        if tensor.name.startswith(("rope_freqs.", "rope_factors_")) and (tensor.data != 1).any():
            return tensor.name
    for name, field in reader.fields.items():
        if name.endswith(".rope.scaling.type") and field.contents() != "none":
            return name
    return None


def _is_scaled(config: PretrainedConfig) -> bool:
    return any(kind not in (None, "default") for kind in _kinds(config.get_text_config()))


def _kinds(config: PretrainedConfig) -> Iterator[Any]:
    """Yield the types of rotary embeddings; there may be one for each type of layer."""
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for each in (said, *said.values()):
        if isinstance(each, dict):
            yield each.get("rope_type", each.get("type"))
