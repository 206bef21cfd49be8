"""Capabilities of devices."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether a `device` multiplies matrices in bfloat16 by instructions of its own, at least twice as fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False


def is_host(device: torch.device) -> bool:
    """Whether tensors on a `device` are in the memory of the process: to read one waits for nothing."""
    return device.type == "cpu"


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether torch.compile writes kernels for a `device` at once: on a GPU, with Triton."""
    return device.type == "cuda" and find_spec("triton") is not None


FAST = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities with float64 at half the rate of float32 (NVIDIA, CUDA C programming guide)."""


@cache
def has_fast_doubles(device: torch.device) -> bool:
    """Whether a device multiplies float64 at half the rate of float32, or so.

    Args:
        device: the device.

    Returns:
        Whether it does; of a CPU, and of what is not known, too.
    """
    return is_host(device) or device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST
