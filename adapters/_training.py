"""Zeros that stay zero while a pruned model is trained, by any optimizer of torch, with adapters of peft or without."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from convexprune.errors import ModelError


@contextmanager
def keep_zeros(model: nn.Module) -> Iterator[dict[str, int]]:
    """Keep the zero weights of a pruned model at zero during any training.

    All present exact zeros of a matrix count; embeddings, and matrices of zeros only (the fresh ones of an adapter),
    train freely. Gradients are zero there, so that neither momentum nor clipping sees them, and writes of a torch
    optimizer there are undone after every step. An adapter (LoRA of peft) acts on the remaining weights only, so that
    the model's function stays the same after merging: merge inside the context. The cost is a byte per weight of these
    matrices, and with an adapter a further product per adapted layer.

    Args:
        model: the model, with its adapter, if any, on the device of the training.

    Yields:
        Numbers of kept zeros by name of the parameter.

    Raises:
        ModelError: no matrix has zeros, or a parameter is not in memory (offloaded, or sharded by DeepSpeed).
    """
    zeros = _zeros(model)
    with ExitStack() as kept:
        kept.callback(_restore, zeros)  # last: after an adapter was merged, say
        for parameter, mask in zeros.values():
            if parameter.requires_grad:
                kept.callback(parameter.register_hook(partial(_without, mask)).remove)
        for down, up, mask in _adapters(model, zeros):
            seen: dict[str, Tensor] = {}  # what enters the adapter, after its dropout
            kept.callback(down.register_forward_pre_hook(partial(_see, seen)).remove)
            kept.callback(up.register_forward_hook(partial(_on_others_only, down, mask, seen)).remove)
        kept.callback(register_optimizer_step_post_hook(lambda *_: _restore(zeros)).remove)
        yield {name: int(mask.sum()) for name, (_, mask) in zeros.items()}


class KeepZeros(TrainerCallback):
    """`keep_zeros` for the Trainer of transformers, from the beginning of the training to the end.

    A merge after the training is not seen: merge an adapter within `keep_zeros`.
    """

    def __init__(self) -> None:
        self._kept = ExitStack()

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """Begin with the present zeros of the model.

        Args:
            given: settings and state of the Trainer.
            named: parts of the Trainer, "model" among them.
        """
        self._kept.close()  # of a training that has failed
        self._kept.enter_context(keep_zeros(named["model"]))

    def on_train_end(self, *given: Any, **named: Any) -> None:
        """Release the zeros.

        Args:
            given: settings and state of the Trainer.
            named: parts of the Trainer.
        """
        self._kept.close()


Zeros = Mapping[str, tuple[nn.Parameter, Tensor]]  # parameters, and where they are zero, by name


def _zeros(model: nn.Module) -> Zeros:
    embeddings = {
        id(own) for module in model.modules() if isinstance(module, nn.Embedding) for own in module.parameters()
    }
    found = dict[str, tuple[nn.Parameter, Tensor]]()
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel():
            raise ModelError(f"{name} is not in memory. Load the model whole (no offloading, no DeepSpeed stage 3).")
        if parameter.ndim < 2 or not parameter.is_floating_point() or id(parameter) in embeddings:
            continue
        mask = parameter.detach() == 0
        if mask.any() and not mask.all():
            found[name] = parameter, mask
    if not found:
        raise ModelError(
            "No matrix of the model has zeros to keep. Give a pruned model, before it is quantized or sharded."
        )
    return found


def _adapters(model: nn.Module, zeros: Zeros) -> Iterator[tuple[Any, Any, Tensor]]:
    """Yield both halves of each LoRA of peft on a weight that has zeros, with the zeros [outputs inputs]."""
    masks = {id(parameter): mask for parameter, mask in zeros.values()}
    layer: Any
    for name, layer in model.named_modules():
        of_parameter = getattr(layer, "parameter_name", None)
        mask = masks.get(id(getattr(getattr(layer, "base_layer", None), of_parameter or "weight", None)))
        if mask is None:
            continue
        if not hasattr(layer, "lora_A") or getattr(layer, "lora_variant", None) or of_parameter:
            raise ModelError(f"{name}: an adapter of another kind than plain LoRA, of which no zeros can be kept.")
        for own, down in layer.lora_A.items():
            yield down, layer.lora_B[own], mask.T if layer.fan_in_fan_out else mask


def _without(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(mask, 0)


def _see(seen: dict[str, Tensor], down: Any, given: tuple[Tensor, ...]) -> None:
    seen["input"] = given[0]


def _on_others_only(down: Any, mask: Tensor, seen: dict[str, Tensor], up: Any, _: Any, output: Tensor) -> Tensor:
    """Return the output of a LoRA's second half, without what its product of two matrices adds to zero weights."""
    return output - linear(seen.pop("input"), (up.weight @ down.weight) * mask)


@torch.no_grad()
def _restore(zeros: Zeros) -> None:
    for parameter, mask in zeros.values():
        parameter.masked_fill_(mask, 0)
