"""Whatever a user's script has set: a run gives the bits of a fresh process, or it is named by what was set."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from door import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from convexprune import prune
from convexprune._device.machine import installation
from convexprune._device.switches import pinned
from convexprune.adapters import HuggingFaceModel

Switch = Callable[[], AbstractContextManager[Any]]
BACKENDS = torch.backends
FORMATS = {
    "generic": BACKENDS,
    "cuda.matmul": BACKENDS.cuda.matmul,
    **{f"{name}.{kind}": getattr(getattr(BACKENDS, name), kind) for name, kind in (
        ("cudnn", "conv"), ("cudnn", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"),
    ) if hasattr(getattr(BACKENDS, name), kind)},
}  # fmt: skip
NEW = hasattr(BACKENDS, "fp32_precision")  # torch 2.9


@contextmanager
def put(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def called(setter: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


SWITCHES: dict[str, Switch] = {
    **{f"matmul {p}": partial(called, torch.set_float32_matmul_precision, p, "highest") for p in ("high", "medium")},
    **{f"{name} {p}": partial(put, place, "fp32_precision", p) for name, place in FORMATS.items()
       for p in ("tf32", "bf16", "ieee") if NEW and (p != "bf16" or "cu" not in name)},
    **{f"default {d}": partial(called, torch.set_default_dtype, d, torch.float32)
       for d in (torch.bfloat16, torch.float16, torch.float64)},
    **{f"autocast {d}": partial(torch.autocast, "cpu", d) for d in (torch.bfloat16, torch.float16)},
    "deterministic": partial(called, torch.use_deterministic_algorithms, True, False),
    "device meta": partial(torch.device, "meta"),
    "default device meta": partial(called, torch.set_default_device, "meta", None),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "no mkldnn": partial(put, BACKENDS.mkldnn, "enabled", False),
    "no flash": partial(called, BACKENDS.cuda.enable_flash_sdp, False, True),
    "benchmark": partial(put, BACKENDS.cudnn, "benchmark", True),
    "flush": partial(called, torch.set_flush_denormal, True, False),
}  # fmt: skip


def seen() -> list[Any]:
    """Every switch that a run may have touched."""
    formats = [place.fp32_precision for place in FORMATS.values()] if NEW else []
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    older = [torch.get_default_dtype(), torch.get_default_device(), BACKENDS.cudnn.benchmark, *grad]
    for switch in (torch.get_float32_matmul_precision, lambda: BACKENDS.cudnn.allow_tf32):
        try:
            older.append(switch())
        except RuntimeError:  # contradictory
            older.append(None)
    return formats + older


def outcome(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], list[tuple[float, float | None]]]:
    """The pruned weights, and the errors and gaps that the report says."""
    with torch.inference_mode(False):
        pruned = deepcopy(model)
    report = prune(pruned, **SMALL, targets=("down_proj",), device="cpu").report
    errors = [(o.relative_error, o.largest_gap) for o in report.operators]
    return {name: p.detach() for name, p in pruned.named_parameters() if "down_proj" in name}, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_and_the_errors_are_those_of_a_fresh_process(tiny_llama: HuggingFaceModel, dtype: torch.dtype):
    tiny_llama.model.to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    weights, errors = outcome(tiny_llama.model)
    installed = installation("cpu")

    @settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.sampled_from(sorted(SWITCHES)), min_size=2, max_size=8, unique=True))
    def check(names: list[str]) -> None:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(SWITCHES[name]())
            before = seen()
            again, errors_again = outcome(tiny_llama.model)
            assert seen() == before
            refused = installation("cpu") != installed  # if such a run were resumed
        same = errors_again == errors and all(torch.equal(weights[name], again[name]) for name in weights)
        assert same or refused, names

    check()


@pytest.mark.parametrize("name", ["deterministic", "no mkldnn", "no flash", "flush"])
def test_a_switch_that_a_run_keeps_names_it(name: str):
    before = installation("cpu")
    with SWITCHES[name](), pinned():
        assert installation("cpu") != before
    assert installation("cpu") == before


def test_the_last_of_several_threads_gives_the_switches_back():
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with pinned():
            entered.set()
            left.wait(10)

    with SWITCHES["matmul medium"](), SWITCHES["default torch.float64"]():
        thread = threading.Thread(target=first)
        thread.start()
        entered.wait(10)
        with pinned():
            left.set()
            thread.join()
            assert torch.get_float32_matmul_precision() == "highest" and torch.get_default_dtype() == torch.float32
        assert torch.get_float32_matmul_precision() == "medium" and torch.get_default_dtype() == torch.float64
