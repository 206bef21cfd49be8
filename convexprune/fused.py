"""Elementwise work of an iteration as one kernel, on devices that torch writes kernels for."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from convexprune.device import has_kernels

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """`function` of tensors, the first one's device deciding: compiled where `has_kernels`, op by op elsewhere.

    What is memory-bound then reads and writes every tensor once. Give it numbers as `number_like`. Results differ in
    rounding only (tests/property/test_fused.py).
    """
    compiled = cache(lambda: torch.compile(function, dynamic=True))  # importing it takes a second

    @wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        return (compiled() if has_kernels(first.device) else function)(first, *args)

    return cast(Function, run)


def number_like(number: float, tensor: Tensor) -> Tensor:
    """A number as a tensor without axes beside another: no kernel is compiled for its value, and nothing waits."""
    return tensor.new_full((), number)
