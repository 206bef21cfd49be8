"""What torch.compile writes in Triton for a GPU: written on a CPU, and run there by Triton's interpreter.

TRITON_INTERPRET=1 python tests/triton_code.py prints a line of JSON for each fused function: how many tensors each of
its kernels reads and writes, and how far the results are from those op by op, in units of the largest where that is
above one. Triton has to be installed.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from convexprune._device import select
from convexprune.core import _penalty as penalty
from convexprune.core import _relaxation as relaxation
from convexprune.pruners import _admm as admm
from convexprune.pruners import _convex as convex
from convexprune.solvers import _cg as cg
from convexprune.solvers import _fista as fista

BLOCKS = {"XBLOCK": 4, "YBLOCK": 4, "R0_BLOCK": 8}  # entries of a block: smaller than a weight, which is [M N]
M, N = 12, 20


class Interpreted:
    """Stands for a kernel, and is run block by block."""

    def __init__(self, source: str) -> None:
        import triton  # pyright: ignore[reportMissingImports]
        import triton.language as tl  # pyright: ignore[reportMissingImports]
        from torch._inductor.runtime import triton_helpers

        self.code = source.split("@triton.jit")[1].strip()
        self._names = re.findall(r"\w+(?=\s*[,:)])", self.code.partition("\n")[0])
        library = {"exp": lambda x: tl.exp(x), "isnan": lambda x: x != x, "copysign": _copysign}  # of the GPU's
        found: dict[str, Any] = {"tl": tl, "tl_math": tl.math, "triton_helpers": triton_helpers}
        found["libdevice"] = SimpleNamespace(**library)
        exec(self.code, found)
        self._kernel = triton.jit(found[self.code.partition("(")[0].removeprefix("def ")])

    def run(self, *args: Any, stream: Any = None) -> None:
        """Launch it, as torch does."""
        given = dict(zip(self._names, args, strict=False))
        blocks = {name: size for name, size in BLOCKS.items() if name in self._names}
        grid = tuple(
            -(-given[f"{axis}numel"] // blocks[f"{axis.upper()}BLOCK"]) for axis in "xy" if f"{axis}numel" in given
        )
        self._kernel[grid](*args, **blocks)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tensors it reads, and how many it writes; a tensor of numbers for each row counts as one."""
        return tuple(len(set(re.findall(rf"tl\.{what}\((\w+)", self.code))) for what in ("load", "store"))


def _copysign(size: Any, sign: Any) -> Any:
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    size = tl.abs(size)
    return tl.where(sign.to(tl.int32, bitcast=True) < 0, -size, size)


@contextmanager
def on_a_gpu() -> Iterator[dict[str, Interpreted]]:
    """Inside, torch.compile writes for tensors of the CPU what it writes for a GPU; the kernels by name."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    made = dict[str, Interpreted]()

    def triton(_: Any, name: str, source: str, **more: Any) -> Interpreted:
        made[name] = Interpreted(source)
        return made[name]

    settings = config.patch(cpu_backend="triton", fx_graph_cache=False)
    driver = patch("torch.utils._triton.triton_hash_with_backend", lambda: "")
    with settings, driver, patch.object(AsyncCompile, "triton", triton):
        yield made


def cases() -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """Every function that is one kernel, and what it may be given."""
    random = torch.Generator().manual_seed(0)
    a, b, c, d, e = (torch.randn(M, N, generator=random) for _ in range(5))
    each, number = torch.rand(M, 1, generator=random) + 1, torch.tensor(0.3)
    yield convex._ahead, [a, b, c, d, number]
    yield convex._strengths, [a, each, number]
    yield penalty._shrink, [a, b.abs(), number, None]
    yield penalty._shrink_ahead, [a, b, c.abs(), number]
    yield cg._advance, [a, b, c, d, e > 0, each, each, each / 10, number / 10]
    yield fista._extrapolate, [a, b, c, torch.empty_like(a), each, True, False]
    yield admm._scores, [a, b, c, number, number]
    yield admm._parts, [a, b > 0]
    bits, digits = a.abs().view(torch.int32), torch.arange(1, 16, dtype=torch.int32) << 24
    yield select._with_digit, [bits, torch.full((M, 1), 0x30000000, dtype=torch.int32), digits, torch.tensor(8)]
    yield select._ranks, [a.view(M, -1, 4)]
    yield select._middle, [a.view(M, -1, 4), 2]
    yield relaxation._gradient, [a, b, c]
    yield relaxation._target, [a, b, c]
    yield relaxation._parted, [a, b.abs()]
    yield relaxation.fractions, [a.abs(), each]
    yield relaxation._nearer, [a.abs(), each, 1.5 * N + each]


def results(function: Callable[..., Any], args: list[Any]) -> list[Tensor]:
    """What it returns, and what it is given as it is then."""
    given = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    return [leaf for leaf in tree_leaves((function(*given), given)) if isinstance(leaf, Tensor)]


def main() -> None:
    for fused, args in cases():
        function = unwrap(fused)
        torch._dynamo.reset()
        with on_a_gpu() as kernels:
            found = results(torch.compile(function, dynamic=True, fullgraph=True), args)
        pairs = zip((x.double() for x in found), (y.double() for y in results(function, args)), strict=True)
        apart = [float((x - y).abs().max() / y.abs().max().clamp_min(1)) for x, y in pairs]
        print(
            json.dumps(
                {"name": fused.__name__, "kernels": [each.counts for each in kernels.values()], "apart": max(apart)}
            )
        )


if __name__ == "__main__":
    main()
