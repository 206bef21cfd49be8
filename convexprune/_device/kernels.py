"""Elementwise work of an iteration as one kernel, on devices that torch writes kernels for."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from convexprune._device.capabilities import has_kernels

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """A function of tensors, compiled into one kernel where the device has kernels (`has_kernels`), op by op elsewhere.

    What is memory-bound then reads and writes every tensor once. Results differ in rounding only
    (tests/property/test_fused.py).

    Args:
        function: of tensors, the first of which decides the device. Numbers are given as `number_like`.

    Returns:
        The function.
    """
    compiled = cache(lambda: torch.compile(function, dynamic=True))  # importing it takes a second

    @wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        return (compiled() if has_kernels(first.device) else function)(first, *args)

    return cast(Function, run)


def number_like(number: float, tensor: Tensor) -> Tensor:
    """A number as a tensor without axes: no kernel is compiled for its value, and nothing waits for the device.

    Args:
        number: the number.
        tensor: whose dtype and device it gets.

    Returns:
        The tensor [].
    """
    return tensor.new_full((), number)
