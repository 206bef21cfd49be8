"""Refuse unsuitable models before any work, with reasons."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PretrainedConfig, PreTrainedModel

from convexprune._device.memory import lacks_memory
from convexprune._storage.tensors import CODES, not_finite
from convexprune.errors import ConvexpruneError, ModelError

from .._discovery.operators import LINEAR_MODULES, held, offloaded

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REMOVERS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}


def require_plain(model: nn.Module, loaded: bool = True) -> None:
    """Refuse a weight that is computed from others, is no plain tensor of floats, or, if `loaded`, is not there."""
    for path, module in model.named_modules():
        if fault := _computed(module):
            raise ModelError(f"{path or 'The model'} {fault}")
        for name, parameter in module.named_parameters(recurse=False):
            absent = loaded and parameter.is_meta and offloaded(module) is None
            if fault := ABSENT if absent else _unusual(parameter, isinstance(module, LINEAR_MODULES)):
                raise ModelError(f"{path}.{name} {fault}")


ABSENT = (
    "is on the meta device and was never loaded, so there is nothing to prune. Load the model with its weights "
    "(from_pretrained, not from_config)."
)


def _computed(module: nn.Module) -> str | None:
    """Return why a module's weight is computed from other tensors, and the remedy; None for a plain module."""
    kind = type(module).__name__
    if type(module).__module__.split(".")[0] == "peft":
        return (
            f"is a {kind} of peft. Merge the adapter first (model = model.merge_and_unload()), prune the result, and "
            "train a new adapter on it."
        )
    if parametrize.is_parametrized(module):
        (name, *_) = getattr(module, "parametrizations", {"weight": None})
        return (
            f"computes its {name} by a parametrization, which would undo the zeros. Make it plain first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})."
        )
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
            remover = REMOVERS.get(type(hook).__name__, "prune.remove")
            return (
                f"computes its {name} by {type(hook).__name__}, which would undo the zeros. Make it plain first: "
                f"torch.nn.utils.{remover}(module, {name!r})."
            )
    if isinstance(module, LINEAR_MODULES) and not isinstance(module._parameters.get("weight"), nn.Parameter):
        return f"is a {kind} whose weight is no parameter. Make it one: module.weight = torch.nn.Parameter(weight)."
    return None


def _unusual(parameter: nn.Parameter, multiplies: bool) -> str | None:
    """Return the fault of a parameter, and the remedy; integers pass unless the module `multiplies` by them."""
    if parameter.is_inference():
        return (
            "was made inside torch.inference_mode(): pruning has to see which tensors change, and to differentiate. "
            "Load the model outside of it."
        )
    numbers = parameter.is_floating_point() or parameter.is_complex() or multiplies
    if numbers and parameter.dtype not in WEIGHT_DTYPES:
        accepted = ", ".join(map(str, WEIGHT_DTYPES))
        return f"is of type {parameter.dtype}; accepted: {accepted}. Load the unquantized checkpoint."
    if type(parameter) is not nn.Parameter:
        return f"is a {type(parameter).__name__}, no plain torch.nn.Parameter. Load the model without such weights."
    if parameter.layout != torch.strided:
        return f"is stored as {parameter.layout}. Make it dense first: torch.nn.Parameter(weight.to_dense())."
    if any(stride == 0 and size > 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        return "repeats its entries in memory (expand). Give each its own: torch.nn.Parameter(weight.clone())."
    return None


@contextmanager
def told_if_failing(model: nn.Module) -> Iterator[None]:
    """Explain a failure of the first forward passes, by the dtypes of the parameters if there are several."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        dtypes = {str(p.dtype): name for name, p in model.named_parameters() if p.is_floating_point()}
        described = len(dtypes) == 1 and any(p.is_meta for p in model.parameters())  # then its configuration is wrong
        if isinstance(error, ConvexpruneError) or lacks_memory(error) or described:
            raise
        named = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        remedy = "It has to run on token ids alone: model(input_ids=...)."
        if len(dtypes) > 1:
            remedy = (
                f"Its parameters are of several types: {named}. Give dtype, or bring them to one type: "
                "model.to(torch.bfloat16)."
            )
        raise ModelError(f"{type(model).__name__} fails on a batch of tokens: {error}. {remedy}") from error


def refuse_quantized(config: PretrainedConfig) -> None:
    """Refuse a quantized checkpoint, whose codes are no weights; transformers makes ordinary floats of a GGUF file."""
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
    """Refuse a model without logits of the next token for `needs`, by purpose the remedy, or an empty text."""
    if needs and model.get_output_embeddings() is None:
        what, instead = next(iter(needs.items()))
        raise ModelError(
            f"{type(model).__name__} has no head that gives the logits of the next token, and {what} needs them. "
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
