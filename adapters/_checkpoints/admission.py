"""Refuse unsuitable models before any work, with reasons."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from convexprune._storage.scan import not_finite
from convexprune._storage.tensors import CODES
from convexprune.errors import ModelError

from .._discovery.experts import fused_parameters
from .._discovery.operators import LINEAR_MODULES, held, offloaded

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse_quantized(config: PretrainedConfig) -> None:
    """Refuse a quantized checkpoint: its weights are codes, and a code of zero is not a weight of zero.

    GGUF passes, because transformers converts the weights into ordinary floats.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    # A dict when it was read from config.json, an object once transformers has loaded the model.
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    method = str(getattr(method, "value", method))
    if method != "gguf":
        raise ModelError(
            f"The model is quantized ({method}); only floating-point weights are read. Give the model that it was "
            "quantized from; for what `convexprune export` wrote, the folder it was made of, which has the same values."
        )


def refuse_adapters(model: object) -> None:
    """Refuse a model with LoRA or another adapter around linear maps: the pruned function would not be the executed
    function.
    """
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if type(module).__module__.split(".")[0] == "peft":
                raise ModelError(
                    f"{name or 'The model'} is a {type(module).__name__} of peft. Merge the adapter first "
                    "(model = model.merge_and_unload()), prune the result, and train a new adapter on it."
                )


def refuse_inference_mode(model: nn.Module) -> None:
    """Refuse inference tensors: torch neither tracks their changes nor differentiates their results."""
    if made := [name for name, parameter in model.named_parameters() if parameter.is_inference()]:
        raise ModelError(
            f"{made[0]} was made inside torch.inference_mode(): pruning has to see which tensors change, and to "
            "differentiate. Load the model outside of it."
        )


def refuse_headless(model: PreTrainedModel, needs: Mapping[str, str]) -> None:
    """Refuse a model without logits of the next token where logits are needed.

    Args:
        needs: by purpose the remedy; empty if there is none.
    """
    if needs and model.get_output_embeddings() is None:
        what, instead = next(iter(needs.items()))
        raise ModelError(
            f"A {type(model).__name__} has no head that gives the logits of the next token, and {what} needs them. "
            f"Give the model with its head (a ...ForCausalLM){instead and ', or '}{instead}."
        )


def refuse_unloaded(model: PreTrainedModel) -> None:
    """Refuse weights that were never loaded. Weights offloaded by accelerate pass."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and offloaded(module) is None:
                raise ModelError(
                    f"{path}.{name} is on the meta device and was never loaded, so there is nothing to prune. "
                    "Load the model with its weights (from_pretrained, not from_config)."
                )


def refuse_non_finite(module: nn.Module, prefix: str = "") -> None:
    """Refuse NaN and infinity in any parameter in memory: a single one spoils every later activation."""
    for path, part in module.named_modules(prefix=prefix.removesuffix(".")):
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta and offloaded(part) is None:
                continue
            value = held(part, name)
            if not bool(value.sum().isfinite()):  # one pass; a sum may overflow where no value is broken
                broken = value.numel() - int(torch.isfinite(value).sum())
                if not broken:
                    continue
                raise not_finite(f"{path}.{name}", broken, value.numel())


def refuse_other_dtypes(layers: nn.ModuleList) -> None:
    """Refuse linear maps whose weights are no floating-point numbers."""
    for name, module in layers.named_modules():
        for parameter in [*fused_parameters(module), *(["weight"] if isinstance(module, LINEAR_MODULES) else [])]:
            dtype = module.get_parameter(parameter).dtype
            if dtype not in WEIGHT_DTYPES:
                raise ModelError(
                    f"{name}.{parameter} of the decoder layers is of type {dtype}; accepted: "
                    f"{', '.join(str(dtype) for dtype in WEIGHT_DTYPES)}. Load the unquantized checkpoint."
                )


def refuse_other_codes(codes: Mapping[str, str]) -> None:
    """Refuse a checkpoint whose weights are not stored as floating-point numbers, because scales might belong to them.

    Args:
        codes: stored types by name of the weight, in the words of safetensors.
    """
    accepted = [CODES[dtype] for dtype in WEIGHT_DTYPES]
    for name, code in codes.items():
        if code not in accepted:
            raise ModelError(
                f"{name} is stored as {code}; accepted: {', '.join(accepted)}. Give the unquantized checkpoint."
            )
