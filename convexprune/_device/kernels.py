"""Elementwise work of an iteration as a single kernel, on devices with a compiler in torch."""

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from convexprune._device.capabilities import has_kernels

Function = TypeVar("Function", bound=Callable[..., Any])

logger = logging.getLogger(__name__)
_failures: list[str] = []
"""Why nothing is compiled in this process any more; empty until that fails."""


def fused(function: Function) -> Function:
    """Compile a function of tensors into a single kernel on devices with kernels (`has_kernels`); elsewhere run op by
    op.

    Memory-bound work then reads and writes a tensor once. torch makes a Triton kernel of the function; no kernel is
    written by hand (tests/unit/test_triton.py). Results differ by rounding only. If the compiler fails (Triton without
    a C compiler, say) and op by op works, a warning appears once, and all later calls run op by op.
    """

    @wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        if not are_fused(first.device):
            return function(first, *args)
        try:
            return _compiled(function)(first, *args)
        except Exception as error:
            result = function(first, *args)  # what fails here as well is not the compiler's fault, and is raised
            _failures.append(_said(error))
            logger.warning(_told())
            return result

    return cast(Function, run)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)  # the first import of a compiler takes seconds


def _said(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:200]


def are_fused(device: torch.device) -> bool:
    return has_kernels(device) and not _failures


def eager_because(device: torch.device | str) -> str | None:
    """Why a GPU works op by op, for whoever reads a report; something small is compiled to know."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    if not has_kernels(device):
        return "Kernels are not fused: Triton is missing (pip install triton). Steps take longer."
    if not _failures:
        _try_to_compile(device)
    return _told() if _failures else None


@cache
def _try_to_compile(device: torch.device) -> None:
    try:
        torch.compile(lambda tensor: tensor + 1, dynamic=True)(torch.zeros(2, device=device))
    except Exception as error:
        _failures.append(_said(error))


def _told() -> str:
    return (
        f"Kernels are not fused: torch.compile failed ({_failures[0]}). Steps take longer. It needs Triton and a C "
        "compiler (apt-get install gcc)."
    )


def number_like(number: float, tensor: Tensor) -> Tensor:
    """Return a number as a tensor without axes: no kernel is compiled for it, and nothing waits for the device."""
    return tensor.new_full((), number)
