"""Build models from configurations, with parameters that take no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

LARGE = 2**30  # numbers in a tensor: more than any buffer has, fewer than the experts of the largest models
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
DRAWS = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"}  # by name: transformers has its own of each


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give modules that are built in the context parameters without memory; buffers are computed as always.

    Buffers without a place in checkpoints, such as the tables of rotary embeddings, are right in this way.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register


class _LargeOnMeta(TorchFunctionMode):
    """Large tensors on the meta device: they would not fit into memory until registered.

    Nothing is drawn for tensors without memory: torch traces drawing in Python, which took three quarters of the
    time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            made = func(*args, **kwargs | {"device": "meta"})
            if made.numel() > LARGE:
                return made
        if getattr(func, "__name__", None) in DRAWS and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        return func(*args, **kwargs)
