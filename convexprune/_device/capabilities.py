"""Capabilities of devices."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

MKLDNN_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def has_bfloat16(device: torch.device) -> bool:
    """Return True if a device multiplies matrices in bfloat16 at least twice as fast as in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and not lacks_products(torch.bfloat16):
        known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False


def lacks_products(dtype: torch.dtype) -> bool:
    """Return True if oneDNN, with which torch multiplies on a CPU, has no quick products of a dtype.

    ONEDNN_MAX_CPU_ISA can deny oneDNN the instructions that the processor has, and torch can be told not to use oneDNN.
    """
    check = getattr(torch.ops.mkldnn, MKLDNN_CHECKS.get(dtype, ""), None)
    return check is not None and not (check() and torch.backends.mkldnn.enabled)


def prefers_onednn() -> bool:
    """Return True on AMD's processors with AVX-512, where MKL, which torch takes for float32, uses AVX2 alone."""
    return torch.backends.mkldnn.enabled and _is_amd_with_avx512()


@cache
def _is_amd_with_avx512() -> bool:
    backends, described = torch.backends, Path("/proc/cpuinfo")
    known = backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    wide = known and backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and described.exists() and "AuthenticAMD" in described.read_text()


def is_host(device: torch.device) -> bool:
    """Return True if tensors on a device are in the memory of the process, so that reads need no waiting."""
    return device.type == "cpu"


@cache
def has_kernels(device: torch.device) -> bool:
    """Return True if torch.compile writes kernels for a device at once: on a GPU, with Triton."""
    return device.type == "cuda" and find_spec("triton") is not None


FAST = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities with float64 at half the rate of float32 (NVIDIA, CUDA C programming guide)."""


@cache
def has_fast_doubles(device: torch.device) -> bool:
    """Return True if a device multiplies float64 at half the rate of float32. Unknown devices are taken to do so."""
    return is_host(device) or device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST
