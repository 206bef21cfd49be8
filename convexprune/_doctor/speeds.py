"""Time products, iterations, selections and copies, and compare with a yardstick."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from convexprune._device import precision
from convexprune._device.capabilities import has_bfloat16
from convexprune._device.precision import Format
from convexprune._doctor.check import Bed, Case, Found
from convexprune.constraints import Constraint, SemiStructured, Unstructured
from convexprune.core import L1, Problem, Quadratic
from convexprune.pruners import Convex
from convexprune.solvers._fista import FISTA
from convexprune.validation._timing import time_in_turns

WIDE = 4096  # from here on a product takes so long that what goes with it must not take as long again
SLOWEST_ITERATION = 2.0  # times the product
SLOWEST_MASK = 1.5  # times a sort of the same scores
BYTES = 12  # of a problem's matrices [n n] in each of the runs that are timed side by side


def cases(bed: Bed) -> Iterator[Case]:
    """The checks of speed."""
    for name in (*DTYPES, *(COARSE if bed.on_gpu else ())):
        yield Case("products", name, partial(product_rate, bed, name))
    for width in bed.widths:
        if BYTES * width**2 <= _memory(bed) // 4:
            yield Case("iterations", f"fista {width}", partial(iteration, bed, width))
    for width in (w for w in bed.widths if w <= bed.round_width):
        yield Case("iterations", f"round of convex {width}", partial(path_round, bed, width))
    patterns: tuple[Constraint, ...] = (Unstructured(0.5), SemiStructured(2, 4))
    for pattern in patterns:
        yield Case("masks", f"mask {pattern}", partial(mask, bed, pattern))
        yield Case("masks", f"threshold {pattern}", partial(threshold, bed, pattern))
    for direction in ("to the device", "to the host") if bed.on_gpu else ():
        yield Case("copies", direction, partial(copies, bed, direction))


def times(bed: Bed, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return median seconds of runs that take turns."""
    return {name: median(each) for name, each in time_in_turns(runs, bed.device, bed.seconds).items()}


def _memory(bed: Bed) -> int:
    return torch.cuda.get_device_properties(bed.device).total_memory if bed.on_gpu else 1 << 34


# ---- products


DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
COARSE: tuple[Format, ...] = ("tf32", "bf16x3")  # which a CPU emulates


def product(bed: Bed, name: str) -> Callable[[], object]:
    """A product of two square matrices."""
    matrix = torch.full((bed.square, bed.square), 0.5, dtype=DTYPES.get(name, torch.float32), device=bed.device)
    if name in DTYPES:
        return lambda: matrix @ matrix
    return lambda: _coarse(name, matrix)


def _coarse(name: Any, matrix: Tensor) -> Tensor:
    with precision.solving_in(name):
        return precision.product(matrix, matrix)


def product_rate(bed: Bed, name: str) -> Found:
    """Measure operations per second. Bfloat16 has to beat float32 on devices that use bfloat16 for steps."""
    seconds = times(bed, {each: product(bed, each) for each in dict.fromkeys((name, "float32"))})
    rate, ratio = 2 * bed.square**3 / seconds[name], seconds["float32"] / seconds[name]
    expected = name == "bfloat16" and bed.on_gpu and has_bfloat16(torch.device(bed.device))
    said = f"{rate / 1e12:.3g} TFLOP/s" + ("" if name == "float32" else f", {ratio:.2f} times float32")
    numbers = {"flops": rate, "over float32": ratio}
    return Found(said, numbers, ratio > 1 if expected else None, "Is the GPU shared, or throttled?")


# ---- iterations


def make_quadratic(bed: Bed, width: int) -> Quadratic:
    """A sum of squares of a weight [rows width]: a unit diagonal, and some directions with more energy."""
    random = torch.Generator(bed.device).manual_seed(0)
    normal = partial(torch.randn, generator=random, device=bed.device)
    directions = normal(width, min(64, width)) / 8
    gram = torch.addmm(torch.eye(width, device=bed.device), directions, directions.T)
    dense = normal(bed.rows, width)
    return Quadratic(gram, normal(bed.rows, width) / 10, torch.full_like(dense[:, 0], width), dense, checked=False)


def _number_of(width: int, bed: Bed) -> int:
    """Return a number of iterations that takes a measurable time: at least three."""
    return max(3, min(20, int(2e10 if bed.on_gpu else 4e8) // (bed.rows * width)))


@torch.no_grad()
def iteration(bed: Bed, width: int) -> Found:
    """Time an iteration of FISTA in units of its matrix product."""
    q, number = make_quadratic(bed, width), _number_of(width, bed)
    assert q.anchor is not None
    problem, start, residual = Problem(q, L1(0.1)), q.anchor, q.cross
    solver = FISTA(0, number, number + 1, scale=False, precise=False)
    out = torch.empty_like(q.cross)

    def bare() -> None:
        for _ in range(number):
            torch.mm(start, q.gram, out=out)

    runs = {"fista": lambda: solver.step(problem, start, residual, certified=False), "product": bare}
    return _beside(times(bed, runs), number, bed.on_gpu and width >= WIDE)


@torch.no_grad()
def path_round(bed: Bed, width: int) -> Found:
    """Time a round of the default method in units of its product in float32. The round may use bfloat16."""
    q, number = make_quadratic(bed, width), _number_of(width, bed)
    pattern = Unstructured(0.5)

    def rounds(count: int) -> Callable[[], object]:
        path = Convex(rounds=count, envelopes=1, refit=None)
        return lambda: path.search(q, pattern)

    assert q.anchor is not None
    dense = q.anchor
    seconds = times(
        bed,
        {"more": rounds(2 + number), "fewer": rounds(2), "product": lambda: [dense @ q.gram for _ in range(number)]},
    )
    lap = max(seconds["more"] - seconds["fewer"], 0.0)
    return _beside({"round": lap, "product": seconds["product"]}, number, False)


def _beside(seconds: dict[str, float], number: int, judged: bool) -> Found:
    lap, product = seconds.values()
    ratio = lap / product
    said = f"{1e3 * lap / number:.3f} ms, {ratio:.2f} times its product in float32"
    numbers = {"ms": 1e3 * lap / number, "product ms": 1e3 * product / number, "over product": ratio}
    passed = ratio <= SLOWEST_ITERATION if judged else None
    return Found(said, numbers, passed, "Elementwise work takes longer than the product: look at the rows on kernels.")


# ---- masks


def _scores(bed: Bed) -> Tensor:
    return torch.rand(bed.matrix, generator=torch.Generator(bed.device).manual_seed(0), device=bed.device)


def mask(bed: Bed, pattern: Constraint) -> Found:
    """Time a mask in units of a sort of the same scores, and count the zeros."""
    scores = _scores(bed)
    seconds = times(bed, {"mask": lambda: pattern.mask(scores), "sort": lambda: scores.flatten().sort()})
    zeros, asked = int((~pattern.mask(scores)).sum()), pattern.zeros(*bed.matrix)
    ratio = seconds["mask"] / seconds["sort"]
    said = f"{1e3 * seconds['mask']:.2f} ms, {ratio:.2f} times a sort; {zeros:,} zeros of {asked:,} asked"
    numbers = {"ms": 1e3 * seconds["mask"], "over sort": ratio, "zeros": zeros, "asked": asked}
    return Found(said, numbers, zeros == asked and (ratio <= SLOWEST_MASK or not bed.on_gpu))


def threshold(bed: Bed, pattern: Constraint) -> Found:
    """Time a threshold in units of a sort. The exact threshold has to be near."""
    scores = _scores(bed)
    seconds = times(bed, {"own": lambda: pattern.threshold(scores), "sort": lambda: scores.flatten().sort()})
    below = float((scores < pattern.threshold(scores)).float().mean())
    ratio = seconds["own"] / seconds["sort"]
    said = f"{1e3 * seconds['own']:.3f} ms, {ratio:.3f} times a sort; {below:.1%} of the scores are below it"
    numbers = {"ms": 1e3 * seconds["own"], "over sort": ratio, "below": below}
    right = abs(below - pattern.sparsity) < 0.03
    return Found(said, numbers, right and (ratio <= SLOWEST_MASK or not bed.on_gpu))


# ---- copies


def copies(bed: Bed, direction: str) -> Found:
    """Bytes a second between host and device, from pinned and from pageable memory."""
    pageable, there = torch.zeros(bed.copied, dtype=torch.uint8), torch.zeros(bed.copied, dtype=torch.uint8)
    hosts, device = {"pageable": pageable, "pinned": there.pin_memory()}, there.to(bed.device)
    put = direction == "to the device"

    def copy(host: Tensor) -> Callable[[], object]:
        return lambda: device.copy_(host, non_blocking=True) if put else host.copy_(device, non_blocking=True)

    rates = {name: bed.copied / lap for name, lap in times(bed, {n: copy(h) for n, h in hosts.items()}).items()}
    said = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items())
    return Found(said, rates)
