"""Compare kernels of torch.compile with the same operations run one by one."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convexprune._device.capabilities import has_fast_doubles
from convexprune._device.kernels import eager_because, number_like
from convexprune._device.parts import Parts, error_of_parts, product_of_parts
from convexprune._doctor.check import Bed, Case, Found
from convexprune._doctor.speeds import times
from convexprune.core._in_parts import OF_RESIDUAL
from convexprune.core._penalty import _shrink_ahead
from convexprune.pruners._convex import _ahead, _strengths
from convexprune.solvers._cg import _advance

ROUNDING = 1e-5  # relative to the largest entry, in float32
SLOWEST = 0.9  # times as fast as op by op
WORK: dict[str, Callable[..., Any]] = {
    "ahead": _ahead, "strengths": _strengths, "shrink": _shrink_ahead, "refit": _advance,
}  # fmt: skip


def cases(bed: Bed) -> Iterator[Case]:
    """The checks of kernels."""
    yield Case("kernels", "compiler", partial(compiler, bed))
    for name in WORK if bed.on_gpu else ():
        yield Case("kernels", name, partial(beside_eager, bed, name))
    yield Case("kernels", "parts", partial(in_parts, bed))


def compiler(bed: Bed) -> Found:
    """Check that torch can compile kernels."""
    if not bed.on_gpu:
        return Found("a CPU works op by op")
    why = eager_because(bed.device)
    return Found(why or "kernels are compiled", passed=why is None)


def beside_eager(bed: Bed, name: str) -> Found:
    """Check that a kernel returns the values of its operations, in no more time."""
    random = torch.Generator(bed.device).manual_seed(0)
    a, b, c, d = (torch.randn(bed.matrix, generator=random, device=bed.device) for _ in range(4))
    number = number_like(0.7, a)
    one = a.new_ones(len(a), 1)
    given: dict[str, tuple[Any, ...]] = {
        "ahead": (a, b, c, d, number), "strengths": (a, b.abs() + 0.1, number), "shrink": (a, b, c.abs(), number),
        "refit": (a, b, c.clone(), d.clone(), torch.ones_like(a, dtype=torch.bool), *(one, one, one / 10), number / 10),
    }  # fmt: skip
    fused, eager = WORK[name], inspect.unwrap(WORK[name])
    seconds = times(bed, {"fused": lambda: fused(*given[name]), "eager": lambda: eager(*given[name])})
    apart = _apart(
        *(each(*(t.clone() if isinstance(t, Tensor) else t for t in given[name])) for each in (fused, eager))
    )
    ratio = seconds["eager"] / seconds["fused"]
    said = f"{1e3 * seconds['fused']:.3f} ms, {ratio:.2f} times as fast as op by op; they differ by {apart:.0e}"
    return Found(
        said, {"ms": 1e3 * seconds["fused"], "faster": ratio, "apart": apart}, apart < ROUNDING and ratio > 0.9
    )


def in_parts(bed: Bed) -> Found:
    """Check the product of parts, used by certificates, against float64 and its error bound."""
    random = torch.Generator(bed.device).manual_seed(1)
    a, b = (torch.randn(256, 256, generator=random, device=bed.device, dtype=torch.float64) for _ in range(2))
    left, right = Parts.of(a, OF_RESIDUAL, 1), Parts.of(b, OF_RESIDUAL, 0)
    wrong = (product_of_parts(left, right, OF_RESIDUAL) - a @ b).abs()
    ratio = float((wrong / error_of_parts(left, right, OF_RESIDUAL)).max())
    way = "float64" if has_fast_doubles(torch.device(bed.device)) else "parts"
    return Found(
        f"certificates are in {way}; products of parts are off by {ratio:.2f} of their bound",
        {"off": ratio},
        ratio <= 1,
    )


def _apart(first: Any, second: Any) -> float:
    pairs: Any = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    return max(_relative(one, other) for one, other in pairs)


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
