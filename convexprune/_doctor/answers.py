"""Solve one problem by every method on the device, and compare with float64 on the CPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from convexprune._doctor.check import Bed, Case, Found
from convexprune.constraints import Columns, Constraint, SemiStructured, Unstructured
from convexprune.core import Moments
from convexprune.pruners import METHODS, PRUNERS, LayerEdit, LayerProblem

LARGEST_GAP = 1e-4
LARGEST_DIFFERENCE = 0.01  # of the errors
LARGEST_ROUNDING = 1e-4  # of an entry of a correlation matrix
CHANGE = 0.1  # of the inputs, by what was pruned before


class Group:
    """An operator of random weights. Its inputs are correlated, and their energy falls as in a language model."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight [m n], and the dense and the pruned inputs [2 n, n] of as many tokens."""
        (m, n), random = self.bed.group, torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=random)
        falling = torch.arange(1, n + 1).rsqrt()
        dense = normal(2 * n, n) * falling @ (normal(n, n) / n**0.5) * normal(n).exp()
        return normal(m, n), dense, dense + CHANGE * normal(2 * n, n) * dense.std(0)

    def problem(self, pattern: Constraint, device: str, dtype: torch.dtype) -> LayerProblem:
        """Return the layer problem, with moments of the sampled tokens."""
        weight, dense, pruned = self.drawn
        halves = [Moments(weight.shape[1], dtype, device) for _ in range(2)]
        every = Moments(weight.shape[1], dtype, device)
        for half, x, x_pruned in zip(halves, dense.chunk(2), pruned.chunk(2), strict=True):
            own = x_pruned.to(device, dtype)
            half.add(own)
            every.add(own, x.to(device, dtype))
        return LayerProblem(weight.to(device, dtype), every, pattern, folds=tuple(halves))

    @cached_property
    def exact(self) -> LayerProblem:
        """Return the problem in float64 on the CPU, the reference of all answers."""
        return self.problem(Unstructured(0.5), "cpu", torch.float64)


def cases(bed: Bed) -> Iterator[Case]:
    """The checks of answers."""
    group = Group(bed)
    patterns: dict[str, Constraint] = {"": Unstructured(0.5), " 2:4": SemiStructured(2, 4)}
    for dtype in (torch.float32, torch.bfloat16):
        yield Case("answers", f"second moments of {str(dtype)[6:]}", partial(second_moments, group, dtype))
    for name in (each for each, method in METHODS.items() if method.whole_only is None):  # those solve nothing
        usual = patterns[""] if name in PRUNERS else Columns(0.5)  # all that the others can take
        for suffix, pattern in patterns.items() if name in ("convex", "admm") else [("", usual)]:
            yield Case("answers", name + suffix, partial(answer, group, name, pattern))
    yield Case("answers", f"{bed.experts[0]} experts side by side", partial(side_by_side, bed))
    for suffix, pattern in patterns.items():
        yield Case("determinism", f"convex{suffix}", partial(determined, group, pattern))


def second_moments(group: Group, dtype: torch.dtype) -> Found:
    """Compare second moments in a number format with float64, in units of the diagonal."""
    x, device = group.drawn[1].to(dtype), group.bed.device
    found, exact = Moments(x.shape[1], device=device), Moments(x.shape[1], torch.float64)
    found.add(x.to(device))
    exact.add(x)
    unit = exact.gram.diagonal().sqrt()
    apart = float(((found.gram.cpu().double() - exact.gram).abs() / unit / unit[:, None]).max())
    return Found(f"differ by {apart:.1e} from those in float64", {"apart": apart}, apart <= LARGEST_ROUNDING)


def answer(group: Group, name: str, pattern: Constraint) -> Found:
    """Check the zeros, the gap and the error of a method's answer against float64 on the CPU."""
    edit = METHODS[name]().prune(group.problem(pattern, group.bed.device, torch.float32))
    exact = METHODS[name]().prune(group.problem(pattern, "cpu", torch.float64))
    errors = [float(group.exact.squared_error(each.weight.cpu().double()).sum()) for each in (edit, exact)]
    difference, zeros, asked = errors[0] / errors[1] - 1, _zeros(edit), pattern.zeros(*group.bed.group)
    gap, gap_exact = _gap(edit), _gap(exact)
    said = f"error {difference:+.2%} of float64's, {zeros:,} zeros of {asked:,} asked"
    numbers: dict[str, float] = {"difference": difference, "zeros": zeros, "asked": asked}
    if gap is not None:
        said, numbers = f"{said}, gap {gap:.1e}", numbers | {"gap": gap}
    passed = (
        abs(difference) <= LARGEST_DIFFERENCE
        and zeros == asked
        and (gap or 0) <= max(LARGEST_GAP, 1.1 * (gap_exact or 0))
    )
    return Found(said, numbers, passed)


def side_by_side(bed: Bed) -> Found:
    """Check that problems solved side by side have the errors of problems solved alone."""
    count, *shape = bed.experts
    first = Group(replace(bed, group=(shape[0], shape[1]))).problem(Unstructured(0.5), bed.device, torch.float32)
    problems = [replace(first, weight=first.weight.roll(i, 0)) for i in range(count)]
    pruner, errors, seconds = PRUNERS["convex"](), list[Tensor](), list[float]()
    pruner.prune_all(problems)  # kernels are compiled once
    for parts in ([[problem] for problem in problems], [problems]):
        began = time.perf_counter()
        edits = [edit for part in parts for edit in pruner.prune_all(part)]
        found = [problem.squared_error(edit.weight).sum() for problem, edit in zip(problems, edits, strict=True)]
        errors.append(torch.stack(found).cpu())
        seconds.append(time.perf_counter() - began)
    difference, quicker = float((errors[1] / errors[0] - 1).abs().max()), seconds[0] / seconds[1]
    said = f"error {difference:.2%} from those one by one, {quicker:.1f} times as fast"
    return Found(said, {"difference": difference, "quicker": quicker}, difference <= LARGEST_DIFFERENCE)


def _gap(edit: LayerEdit) -> float | None:
    """Return the gap of the last solve. A published method may stop at a larger gap."""
    return edit.solutions[-1].certificate.relative_gap if edit.solutions else None


def _zeros(edit: LayerEdit) -> int:
    return int((edit.weight == 0).sum())


def determined(group: Group, pattern: Constraint) -> Found:
    """Run the default method twice under `torch.use_deterministic_algorithms(True)` and compare the bits."""
    problem = group.problem(pattern, group.bed.device, torch.float32)
    with deterministic():
        first, second = (PRUNERS["convex"]().prune(problem).weight for _ in range(2))
    differ = int((first != second).sum())
    return Found(f"{differ} of {first.numel():,} entries differ", {"differ": differ}, differ == 0)


@contextmanager
def deterministic() -> Iterator[None]:
    """Let torch refuse operations whose bits can change from run to run."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
