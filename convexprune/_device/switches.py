"""Torch's numerical switches, which a user's script may have set: pinned for a run, or part of the run's identity."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

R = TypeVar("R")
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
"""Environment variables by which libraries choose an instruction set or a format of products."""

_lock = threading.Lock()
_pins = ExitStack()  # of the process, for all runs in it
_runs = 0


@contextmanager
def restored(read: Callable[[], R], write: Callable[[R], object], value: R) -> Iterator[None]:
    """Set a switch of torch inside the block."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextmanager
def pinned() -> Iterator[None]:
    """Compute as in a fresh process: float32 products in float32, no autocast, tensors of float32 on the CPU.

    The user's settings are back afterwards; of runs in several threads, after the last one.
    """
    with _pinned_in_process(), torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _pinned_in_process() -> Iterator[None]:
    global _runs
    with _lock:
        _runs += 1
        if _runs == 1:
            _pins.enter_context(restored(torch.get_default_dtype, torch.set_default_dtype, torch.float32))
            _pins.enter_context(_full_float32())
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            if not _runs:
                _pins.close()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Set the switches of both generations: torch refuses to multiply where those of a GPU contradict each other."""
    backends, formats = torch.backends, _formats()
    matmul, tf32 = _read(torch.get_float32_matmul_precision), _read(lambda: backends.cudnn.allow_tf32)
    before, tuned = [format.fp32_precision for format in formats], backends.cudnn.benchmark
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = backends.cudnn.benchmark = False  # which times kernels, and takes another each time
    for format in formats:
        format.fp32_precision = "ieee"
    try:
        yield
    finally:
        backends.cudnn.benchmark = tuned
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if tf32 is not None:
            backends.cudnn.allow_tf32 = tf32
        for format, value in zip(formats, before, strict=True):
            format.fp32_precision = "none"  # inherited, as it was unless it differs
            if format.fp32_precision != value:
                format.fp32_precision = value


def _formats() -> list[Any]:
    """Return the switches of float32 products that torch has since 2.9, one for each library and kind of product."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    new = hasattr(torch.backends, "fp32_precision")
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn] if new else []


def _read(switch: Callable[[], R]) -> R | None:
    """Return the value of an older switch; None if newer switches contradict and torch raises."""
    try:
        return switch()
    except RuntimeError:
        return None


def recorded() -> dict[str, str]:
    """Return the switches, and variables of the environment, that can change bits and are not as torch sets them."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    smallest = torch.full((), 5e-324, dtype=torch.float64, device="cpu")
    switches = {
        "deterministic_algorithms": (torch.are_deterministic_algorithms_enabled(), False),
        "cudnn.deterministic": (cudnn.deterministic, False),
        "cudnn.enabled": (cudnn.enabled, True),
        "mkldnn.deterministic": (mkldnn.deterministic, False),
        "mkldnn.enabled": (mkldnn.enabled, True),
        "flash_sdp": (cuda.flash_sdp_enabled(), True),
        "mem_efficient_sdp": (cuda.mem_efficient_sdp_enabled(), True),
        "math_sdp": (cuda.math_sdp_enabled(), True),
        "cudnn_sdp": (cuda.cudnn_sdp_enabled(), True),
        "fp16_reduced_precision_reduction": (cuda.matmul.allow_fp16_reduced_precision_reduction, True),
        "bf16_reduced_precision_reduction": (cuda.matmul.allow_bf16_reduced_precision_reduction, True),
        "fp16_accumulation": (getattr(cuda.matmul, "allow_fp16_accumulation", False), False),
        "flush_denormal": (bool(smallest * 1 == 0), False),
    }
    changed = {name: str(value) for name, (value, usual) in switches.items() if value != usual}
    return changed | {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
