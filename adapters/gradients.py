"""How much the outputs of each operator move the loss: a diagonal Fisher estimate on the calibration tokens."""

from functools import partial

import torch
from torch import Tensor, nn

from convexprune.errors import ModelError

from .huggingface import HuggingFaceModel
from .operators import LINEAR_MODULES


@torch.enable_grad()
def output_fisher(model: HuggingFaceModel, tokens: Tensor, batch_size: int = 1) -> dict[str, Tensor]:
    """f_i = mean over tokens of (d loss / d y_i)^2 for the outputs y [m] of each operator, by "layer.operator".

    The loss is the summed negative log-likelihood of a window of `tokens` [windows length] (the empirical Fisher: the
    labels are the text's own). The parameters ask for no gradients; the embeddings do, so that activations have them.

    Raises:
        ModelError: an operator is not a module of its own (experts that are slices of one parameter).
    """
    inner, found, hooks = model.model, {}, []

    def start(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    def watch(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        output.register_hook(partial(add, name))

    def add(name: str, gradient: Tensor) -> None:
        found[name] = found.get(name, 0) + gradient.double().square().flatten(0, -2).sum(0)

    try:
        hooks.append(inner.get_input_embeddings().register_forward_hook(start))
        for layer in model.layers:
            for operator in layer.operators:
                name = f"{layer.name}.{operator.name}"
                modules = dict(layer.module.named_modules())
                if not isinstance(modules.get(operator.name), LINEAR_MODULES):
                    raise ModelError(f"{name} is no module of its own, so the gradients of its outputs are not seen.")
                hooks.append(modules[operator.name].register_forward_hook(partial(watch, name)))
        for ids in tokens.split(batch_size):
            logits = inner(input_ids=ids.to(inner.device), use_cache=False).logits[:, :-1].float()
            labels = ids[:, 1:].to(logits.device)
            nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / tokens.numel()).float() for name, total in found.items()}
