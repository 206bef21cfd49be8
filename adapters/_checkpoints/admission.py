"""Refuse unsuitable models before any work, with reasons."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from convexprune._storage.scan import not_finite
from convexprune._storage.tensors import CODES
from convexprune.errors import ModelError

from .._discovery.operators import held, offloaded
from .plain import WEIGHT_DTYPES


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


def refuse_headless(model: PreTrainedModel, needs: Mapping[str, str]) -> None:
    """Refuse a model without logits of the next token for `needs`, which have by purpose the remedy, or an empty
    text.
    """
    if needs and model.get_output_embeddings() is None:
        what, instead = next(iter(needs.items()))
        raise ModelError(
            f"A {type(model).__name__} has no head that gives the logits of the next token, and {what} needs them. "
            f"Give the model with its head (a ...ForCausalLM){instead and ', or '}{instead}."
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


def refuse_other_codes(codes: Mapping[str, str]) -> None:
    """Refuse weights stored (`codes`) as other than floating-point numbers, because scales might belong to them."""
    accepted = [CODES[dtype] for dtype in WEIGHT_DTYPES]
    for name, code in codes.items():
        if code not in accepted:
            raise ModelError(
                f"{name} is stored as {code}; accepted: {', '.join(accepted)}. Give the unquantized checkpoint."
            )
