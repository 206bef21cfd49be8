"""A model built from its configuration, with random weights that take no memory and multiply in no time.

With it `inspect` finds operators by a run's discovery, on a machine that could not hold a single layer.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from convexprune._layerwise.model import DecoderLayer

from .._discovery.experts import FusedExperts, fused_parameters
from .._discovery.family import decoder_layers
from .._huggingface import HuggingFaceModel

ADDED = torch.ops.aten.addmm.default
PRODUCTS = (ADDED, torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


class RandomModel(HuggingFaceModel):
    """A model with parameters on the meta device; weights of a decoder layer are random while resident."""

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        inside, _ = decoder_layers(model)
        outside = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{inside}.")}
        model.load_state_dict(_random(outside), strict=False, assign=True)
        model.tie_weights()
        super().__init__(model, **options)

    @property
    def streams(self) -> bool:
        return True

    @contextmanager
    def resident(self, layer: DecoderLayer) -> Iterator[None]:
        away = layer.module.state_dict()
        layer.module.load_state_dict(_random(away), assign=True)
        try:
            with _every_expert_by_itself(layer.module), _QuickProducts():
                yield
        finally:
            layer.module.load_state_dict(away, assign=True)


class _QuickProducts(TorchDispatchMode):
    """Replace products with random weights by a sum that depends on every input, as discovery requires."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or not _overlaps(args[-1]):
            return func(*args, **(kwargs or {}))
        x, weight = args[-2:]
        inputs, outputs = weight.shape[-2:]
        own = x[..., torch.arange(outputs) % inputs] * weight[..., :1, :]
        product = own + x.mean(-1, keepdim=True)
        return product + args[0] if func is ADDED else product


@contextmanager
def _every_expert_by_itself(layer: nn.Module) -> Iterator[None]:
    with ExitStack() as looped:
        for module in layer.modules():
            if fused_parameters(module):
                looped.enter_context(FusedExperts(module).looped())
        yield


def _random(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return reproducible values for tensors without values: random matrices, and vectors of ones."""
    generator = torch.Generator().manual_seed(0)
    return {name: _values(tensor, generator) if tensor.is_meta else tensor for name, tensor in state.items()}


def _values(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return ones, or a matrix whose rows are windows of a short random sequence: W[i, j] = r[2 i + j]."""
    if like.dim() < 2:
        return torch.ones_like(like, device="cpu")
    strides = tuple(range(like.dim(), 0, -1))
    length = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True))
    numbers = torch.randn(length, dtype=torch.float32, generator=generator)
    return numbers.to(like.dtype).as_strided(like.shape, strides)


def _overlaps(weight: Tensor) -> bool:
    """Return True if rows overlap in memory, as in random weights."""
    return weight.untyped_storage().nbytes() < weight.nbytes
