"""Float32 products of a solve and of second moments by MKL and by oneDNN, side by side: GFLOP/s, and the rounding.

    python benchmarks/products.py [--threads 2] [--repeats 5]

*rounding* is the largest error over sum_k |a_ik b_kj|, in units of float32's rounding error 2^-24. A run takes oneDNN
where `convexprune._device.capabilities.prefers_onednn` says so. Here each library has its turn, product by product.
"""

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from convexprune._device import precision
from convexprune._device.precision import product
from convexprune.core._symmetric import add_square, from_upper

SHAPES = (
    (17920, 1536, 1536), (1536, 8960, 8960), (2048, 576, 576), (64, 576, 576), (256, 256, 256), (128, 256, 128)
)  # fmt: skip
TOKENS = ((4096, 576), (4096, 1536), (2048, 8960))
LIBRARIES = {"MKL": False, "oneDNN": True}
ROWS = 64  # of a result that is compared with float64


def moments(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[1], x.shape[1])
    add_square(total, x)
    return total


def line(
    name: str, multiply: Callable[[], Tensor], finish: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, repeats: int
) -> str:
    """Return the best rate and the rounding of each library, in turn in every repeat; `finish` is not timed."""
    operations = a.numel() * b.shape[1] * (1 if finish is from_upper else 2)
    exact, reach = a[:ROWS].double() @ b.double(), a[:ROWS].abs().double() @ b.abs().double()
    best, rounding = dict.fromkeys(LIBRARIES, 0.0), dict.fromkeys(LIBRARIES, 0.0)
    for _ in range(repeats + 1):  # the first one only warms up
        for library, preferred in LIBRARIES.items():
            with patch.object(precision, "prefers_onednn", lambda preferred=preferred: preferred):
                began = time.perf_counter()
                found = multiply()
                seconds = time.perf_counter() - began
            best[library] = max(best[library], operations / seconds / 1e9)
            rounding[library] = float(((finish(found)[:ROWS] - exact).abs() / reach).max()) * 2**24
    return f"| {name} | {' | '.join(f'{best[k]:.0f}, {rounding[k]:.1f}' for k in LIBRARIES)} |"


def main() -> None:
    """Print the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    random = torch.Generator().manual_seed(0)
    print(f"| product | {' | '.join(f'{name}: GFLOP/s, rounding' for name in LIBRARIES)} |\n|---|---|---|")
    for m, k, n in SHAPES:
        a, b = torch.randn(m, k, generator=random), torch.randn(k, n, generator=random)
        shape = f"{m:,} x {k:,} x {n:,}"
        print(line(shape, lambda a=a, b=b: product(a, b), Tensor.clone, a, b, asked.repeats), flush=True)
    for tokens, inputs in TOKENS:
        x = torch.randn(tokens, inputs, generator=random)
        name = f"second moments of {tokens:,} tokens, {inputs:,} inputs"
        print(line(name, lambda x=x: moments(x), from_upper, x.T, x, asked.repeats), flush=True)


if __name__ == "__main__":
    main()
