"""Number formats for products of float32 matrices: a run names a format for Gram matrices and a format for solves.

    float32   unchanged
    tf32      both factors rounded to 11 significant bits, sums in float32
    bf16x3    both factors split into two of bfloat16; the three larger products of parts summed in float32: 16 bits
    auto      float32 on a CPU; bf16x3 on a GPU that multiplies bfloat16 and sums in float32

On a CPU the coarse formats are emulated, to show their cost. Certificates are in float64, or in `Parts` where a GPU is
slow at float64: a bound in either case.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convexprune._device.capabilities import (
    MKLDNN_CHECKS,
    has_bfloat16,
    has_fast_doubles,
    is_host,
    lacks_products,
    prefers_onednn,
)
from convexprune._device.switches import restored

Format = Literal["auto", "float32", "tf32", "bf16x3"]
FORMATS: tuple[Format, ...] = get_args(Format)

T = TypeVar("T")
_solving: ContextVar[Format] = ContextVar("solving", default="float32")
_summing: ContextVar[Format] = ContextVar("summing", default="auto")

CertificateFormat = Literal["auto", "float64", "parts"]
_certifying: ContextVar[CertificateFormat] = ContextVar("certifying", default="auto")


@contextmanager
def _within(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


solving_in = partial(_within, _solving)
"""Inside, products of solves are in a format."""
summing_in = partial(_within, _summing)
"""Inside, second moments are added up in a format."""
certifying_in = partial(_within, _certifying)
"""Inside, precise certificates are computed in a format."""


def certifies_in_parts(like: Tensor) -> bool:
    """Return True if a certificate takes no product in float64: by default on GPUs with slow float64.

    Never for a problem in float64: parts represent numbers of float32.
    """
    if like.dtype != torch.float32 or _certifying.get() == "float64":
        return False
    return _certifying.get() == "parts" or (not has_fast_doubles(like.device) and has_wide_sums(like.device))


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Return total [m k] + alpha a b in the format of solves; see `product`."""
    if _chosen(_solving.get(), a) != "float32" or _by_onednn(a, b):
        return torch.add(total, product(a, b), alpha=alpha, out=out)
    if b.ndim == 2:
        return torch.addmm(total, a, b, alpha=alpha, out=out)
    into = None if out is None else _by_matrix(out, b)
    return torch.baddbmm(_by_matrix(total, b), _by_matrix(a, b), b, alpha=alpha, out=into).flatten(0, 1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a product a b [m k] in the format of solves; of several matrices b [e n k] each has the next m/e rows."""
    return _by_rows(_multiplied(_by_matrix(a, b), b, _chosen(_solving.get(), a)))


def bare_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a product a b [m k] in the dtype of both; see `product`."""
    return _by_rows(_times(_by_matrix(a, b), b))


def _by_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Split rows [m n] by matrix into [e m/e n], if there are several matrices [e n k]."""
    return a if b.ndim == 2 else a.unflatten(0, (len(b), -1))


def _by_rows(a: Tensor) -> Tensor:
    return a if a.ndim == 2 else a.flatten(0, 1)


def add_gram(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a' b to a total [n k] in place, in the format of second moments.

    Inputs in 16 bits have exact products in float32: on a GPU with float32 sums only the sums are rounded.
    """
    if a.dtype == b.dtype != total.dtype and _summing.get() == "auto" and has_wide_sums(a.device):
        total.add_(torch.mm(a.T, b, out_dtype=torch.float32))  # pyright: ignore[reportCallIssue]
        return
    a, b = a.to(total), b.to(total)
    format = _chosen(_summing.get(), a)
    if format == "float32" and not _by_onednn(a.T, b):
        total.addmm_(a.T, b)
    else:
        total.add_(_multiplied(a.T, b, format))


@cache
def has_wide_sums(device: torch.device) -> bool:
    """Return True if a GPU multiplies bfloat16 and sums in float32 and torch allows both (2.8 or newer)."""
    if is_host(device) or not has_bfloat16(device):
        return False
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return torch.mm(ones, ones, out_dtype=torch.float32).dtype == torch.float32  # pyright: ignore[reportCallIssue]
    except (RuntimeError, TypeError):
        return False


def _chosen(format: Format, like: Tensor) -> Format:
    if like.dtype != torch.float32:
        return "float32"  # as it is
    if format == "auto":
        return "bf16x3" if has_wide_sums(like.device) else "float32"
    return format


def _multiplied(a: Tensor, b: Tensor, format: Format) -> Tensor:
    if format == "bf16x3":
        (high_a, low_a), (high_b, low_b) = _split(a), _split(b)
        return wide_product(low_a, high_b).add_(wide_product(high_a, low_b)).add_(wide_product(high_a, high_b))
    if format == "tf32" and is_host(a.device):
        return _rounded(a) @ _rounded(b)
    if format == "tf32":
        with restored(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"):
            return a @ b
    return _times(a, b)


_LARGE = 2**22  # multiplications, below which MKL is about as quick


def in_columns(x: Tensor) -> Tensor:
    """Return tokens [tokens n] with each column whole in memory, where strips of columns go to oneDNN."""
    return x.T.contiguous().T if x.dtype == torch.float32 and is_host(x.device) and prefers_onednn() else x


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "") if _by_onednn(a, b) else a @ b


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Return True for a large product of matrices in float32 without gradients, where oneDNN is quicker.

    For parts of matrices oneDNN has reference code alone, a thousand times slower.
    """
    if a.dtype != torch.float32 or a.ndim != 2 or b.ndim != 2 or len(a) * b.numel() < _LARGE or not is_host(a.device):
        return False
    whole = all(each.is_contiguous() or each.T.is_contiguous() for each in (a, b))
    return whole and not (a.requires_grad or b.requires_grad) and prefers_onednn()


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    """Split into the nearest bfloat16 and the nearest bfloat16 of the remainder."""
    high = a.bfloat16()
    return high, (a - high).bfloat16()


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a product of bfloat16 matrices, or stacks, with sums in float32. Products of two entries are exact."""
    if is_host(a.device) or not has_wide_sums(a.device):
        return a.float() @ b.float()
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]


def _rounded(a: Tensor) -> Tensor:
    """Round to the 10 explicit bits of TF32."""
    return ((a.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# ---- products of 16 bits on a CPU without instructions for 16 bits: in float32, rounded at the end


_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}
"""Position of the left factor, whose rows are tokens, among the arguments of a product."""
_FEW = 32  # rows, below which a product takes less time than a copy of the weights in float32


def widened(device: torch.device, dtype: torch.dtype, rows: int = _FEW) -> AbstractContextManager[Any]:
    """Compute products of 16 bits in float32 and round the result, where a CPU is slow at 16 bits.

    Without such instructions torch adds up entry by entry, 5 to 100 times slower than in float32. Sums are in float32
    there as well: results differ by the order of the sums. `rows` is the largest number of rows of a product.
    """
    return _Widened() if rows >= _FEW and is_host(device) and lacks_products(dtype) else nullcontext()


class _Widened(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left = _PRODUCTS.get(func)
        if left is None or (dtype := args[left].dtype) not in MKLDNN_CHECKS or args[left].shape[-2] < _FEW:
            return func(*args, **kwargs or {})
        wide = (arg.float() if isinstance(arg, Tensor) else arg for arg in args)
        return func(*wide, **kwargs or {}).to(dtype)


# ---- products of float64 from exact products of small integers, for GPUs whose float64 has 1/32 or 1/64 of the speed


BITS = 6  # of a part
LINES = 2**12
"""A number is cut into parts of six bits (Ozaki et al. 2012). Products of two parts, summed over so many terms, are
integers of at most 2^24. Float32 holds such integers in any order of summation: the sums are exact where bfloat16 is
multiplied and float32 summed. The remainder has a bound."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A matrix, scale * (sum of parts_p 2^(-6 p) + rest), with every rest at most 2^(-6 count) / 2."""

    parts: tuple[Tensor, ...]  # integers of at most 64 in bfloat16 [m n], the largest first
    scale: Tensor  # powers of two, [m 1] or [1 n]

    @classmethod
    def of(cls, matrix: Tensor, count: int, dim: int) -> "Parts":
        """Cut a float64 matrix [m n] into parts; `dim` is the axis of the sum in a product: 1 left, 0 right."""
        largest = matrix.abs().amax(dim, keepdim=True)
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)  # above the largest entry
        rest, parts = matrix / scale, list[Tensor]()
        for _ in range(count):
            rest = rest * 2**BITS
            parts.append(rest.round())
            rest = rest - parts[-1]  # nothing is rounded here
        return cls(tuple(part.bfloat16() for part in parts), scale)


def product_of_parts(a: Parts, b: Parts, count: int) -> Tensor:
    """Return a product a b [m k] in float64, without products of parts below the last of `count`."""
    n = a.parts[0].shape[1]
    total = torch.zeros(len(a.parts[0]), b.parts[0].shape[1], dtype=torch.float64, device=a.scale.device)
    for order in range(count - 1, -1, -1):  # the small ones first
        for i in range(order + 1):
            for lines in (slice(first, first + LINES) for first in range(0, n, LINES)):
                exact = wide_product(a.parts[i][:, lines], b.parts[order - i][lines])
                total.add_(exact.double(), alpha=2.0 ** (-BITS * (order + 2)))
    return total.mul_(a.scale).mul_(b.scale)


def error_of_parts(a: Parts, b: Parts, count: int) -> Tensor:
    """Bound the error of every entry in a row of `product_of_parts`.

    A term of the sum over n loses at most 2^(-6 count) (3 + count) / 4, in units of both scales. Sums of float64 have a
    rounding error per term. The bound is [m 1].
    """
    n = a.parts[0].shape[1]
    sums = count * (count + 1) // 2 * -(-n // LINES)
    relative = 2.0 ** (-BITS * count) * (3 + count) / 4 + sums * torch.finfo(torch.float64).eps
    return n * relative * a.scale * b.scale.amax()
