"""Products of 16 bits on a CPU without instructions for them."""

from collections import Counter

import pytest
import torch
from door import SMALL, TOKENS
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from convexprune import prune
from convexprune._device.capabilities import MKLDNN_CHECKS
from convexprune._device.precision import widened
from convexprune.adapters import HuggingFaceModel

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)


class Multiplied(TorchDispatchMode):
    """Counts matrix products of at least so many rows by dtype."""

    def __init__(self, rows: int = 1) -> None:
        super().__init__()
        self._rows = rows
        self.counts = Counter[torch.dtype]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm") and args[-2].shape[-2] >= self._rows:
            self.counts[args[-1].dtype] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose oneDNN has no products of 16 bits, whatever instructions the processor has."""
    for name in MKLDNN_CHECKS.values():
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False, raising=False)


@pytest.mark.usefixtures("lacking")
@pytest.mark.parametrize("dtype", HALF)
def test_they_are_those_of_float32_rounded_once(dtype: torch.dtype):
    @given(st.integers(0, 99), st.integers(32, 70), st.integers(1, 70))
    def check(seed: int, rows: int, width: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(each, width, generator=generator).to(dtype) for each in (rows, 5))
        bias = torch.randn(5, generator=generator).to(dtype)
        with widened(CPU, dtype):
            assert torch.equal(x @ w.T, (x.float() @ w.float().T).to(dtype))
            assert torch.equal(linear(x, w, bias), torch.addmm(bias.float(), x.float(), w.float().T).to(dtype))
            assert torch.equal(torch.bmm(x[None], w.T[None])[0], (x.float() @ w.float().T).to(dtype))

    check()


@pytest.mark.usefixtures("lacking")
def test_few_rows_and_other_dtypes_are_as_they_are():
    w = torch.randn(64, 64)
    with Multiplied() as multiplied:
        for x in (torch.ones(31, 64), torch.ones(64, 64)):
            with widened(CPU, torch.bfloat16):
                _ = x.bfloat16() @ w.bfloat16()
                _ = x.double() @ w.double()
    assert multiplied.counts == {torch.bfloat16: 1, torch.float32: 1, torch.float64: 2}


@pytest.mark.usefixtures("lacking")
def test_a_derivative_is_widened_as_well():
    x, w = torch.randn(40, 40).bfloat16().requires_grad_(), torch.randn(40, 40).bfloat16()
    with Multiplied() as multiplied, widened(CPU, torch.bfloat16):
        (gradient,) = torch.autograd.grad((x @ w).sum(), x)
    assert multiplied.counts == {torch.float32: 2} and gradient.dtype == torch.bfloat16


@pytest.mark.usefixtures("lacking")
@pytest.mark.parametrize("settings", [{}, {"prefix": "pruned"}, {"allocation": "rows", "evaluation": TOKENS}])
@pytest.mark.parametrize("instructions", [{}, {"avx512_bf16": True, "amx_bf16": True}])
def test_a_run_multiplies_nothing_in_16_bits(tiny_llama: HuggingFaceModel, monkeypatch, settings, instructions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    with Multiplied(rows=32) as multiplied:
        prune(tiny_llama.model.bfloat16(), **SMALL, batch_size=2, **settings)
    assert multiplied.counts[torch.float32] and not multiplied.counts[torch.bfloat16]


def test_a_cpu_with_such_products_takes_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.ops.mkldnn, MKLDNN_CHECKS[torch.bfloat16], lambda: True, raising=False)
    with Multiplied() as multiplied, widened(CPU, torch.bfloat16):
        _ = torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    assert multiplied.counts == {torch.bfloat16: 1}


def test_another_device_takes_its_own():
    with Multiplied() as multiplied, widened(torch.device("cuda"), torch.bfloat16):
        _ = torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    assert multiplied.counts == {torch.bfloat16: 1}
