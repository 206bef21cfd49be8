"""Which models are refused before any work is done on them, and why."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from convexprune.errors import ModelError

from .family import Family

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse_quantised(config: PretrainedConfig) -> None:
    """Refuse a quantised checkpoint: its weights are codes, and a code that is zero is not a weight that is zero.

    GGUF is let through, because transformers turns its weights into ordinary floats while it reads them.

    Raises:
        ModelError: the configuration names a quantisation.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    # A dict when it was read from config.json, an object once transformers has loaded the model.
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    method = str(getattr(method, "value", method))
    if method != "gguf":
        raise ModelError(
            f"The model is quantised ({method}); only floating-point weights can be pruned. "
            "Prune the model that it was quantised from, then quantise the result."
        )


def refuse_offloaded(model: PreTrainedModel) -> None:
    """Refuse weights that are not in memory: what is written to them is lost without a word.

    Raises:
        ModelError: a parameter is on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"{name} is on the meta device: it was offloaded or never loaded, so it can be neither read nor "
                "written. Load the whole model onto one device, without device_map or with enough memory for it."
            )


def refuse_non_finite(module: nn.Module, prefix: str = "") -> None:
    """Refuse NaN and infinity in any parameter that is in memory: one of them spoils every activation behind it.

    Raises:
        ModelError: a parameter holds a value that is not finite; the message names it and counts them.
    """
    for name, parameter in module.named_parameters(prefix.removesuffix(".")):
        if parameter.is_meta:
            continue
        broken = parameter.numel() - int(torch.isfinite(parameter).sum())
        if broken:
            raise ModelError(
                f"{name} holds {broken:,} of {parameter.numel():,} values that are NaN or infinite. "
                "Repair or download the checkpoint again; float16 checkpoints may overflow, bfloat16 ones do not."
            )


def refuse_foreign_operators(model: PreTrainedModel, family: Family) -> None:
    """Refuse a model whose operators are not plain linear maps with floating-point weights.

    Raises:
        ModelError: an operator of the family is missing, is not an `nn.Linear` or has weights of another type; or
            the model has no decoder layers where its family has them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if family.layers not in modules:
        raise ModelError(
            f"A {type(model).__name__} has no {family.layers}. Load the model with AutoModelForCausalLM, unwrapped."
        )
    for index, _ in enumerate(modules[family.layers].children()):
        for relative in (name for stage in family.stages for name in stage):
            name = f"{family.layers}.{index}.{relative}"
            found = modules.get(name)
            if not isinstance(found, nn.Linear):
                kind = "missing" if found is None else f"a {type(found).__name__}"
                raise ModelError(
                    f"{name} is {kind}; the {family.model_type} family needs an nn.Linear there. "
                    "Merge adapters into the model, or load the unmodified checkpoint."
                )
            if found.weight.dtype not in WEIGHT_DTYPES:
                raise ModelError(
                    f"{name} has weights of type {found.weight.dtype}; accepted: "
                    f"{', '.join(str(dtype) for dtype in WEIGHT_DTYPES)}. Load the unquantised checkpoint."
                )
