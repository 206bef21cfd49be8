"""Solve one problem by every method on the device, and compare with float64 on the CPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from convexprune._device.kernels import eager_because
from convexprune._device.precision import Parts, error_of_parts, product_of_parts
from convexprune._device.switches import restored
from convexprune.constraints import Columns, Constraint, SemiStructured, Unstructured
from convexprune.core import Moments
from convexprune.core._in_parts import OF_RESIDUAL
from convexprune.pruners import METHODS, PRUNERS, LayerEdit, LayerProblem

LARGEST_GAP = 1e-4
LARGEST_DIFFERENCE = 0.01  # of the errors
LARGEST_ROUNDING = 1e-4  # of an entry of a correlation matrix
CHANGE = 0.1  # of the inputs, by what was pruned before


class Measurement(NamedTuple):
    """A sentence and its numbers; `passed` is None without a limit."""

    said: str
    numbers: dict[str, float]
    passed: bool | None


class Check(NamedTuple):
    kind: str
    case: str
    measure: Callable[[], Measurement]


@dataclass(frozen=True)
class Sizes:
    device: str
    group: tuple[int, int] = (48, 192)  # shape [m n] of the problem that every method solves
    hidden: int = 64  # width of the two-layer LLaMA
    length: int = 64  # tokens of a window of the LLaMA

    @classmethod
    def on(cls, device: str) -> "Sizes":
        return cls(device, (128, 4096), 2048, 2048) if device.startswith("cuda") else cls(device)


class Group:
    """An operator of random weights. Its inputs are correlated, and their energy falls as in a language model."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight [m n], and the dense and the pruned inputs [2 n, n] of as many tokens."""
        (m, n), random = self.sizes.group, torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=random)
        falling = torch.arange(1, n + 1).rsqrt()
        dense = normal(2 * n, n) * falling @ (normal(n, n) / n**0.5) * normal(n).exp()
        return normal(m, n), dense, dense + CHANGE * normal(2 * n, n) * dense.std(0)

    def problem(self, pattern: Constraint, device: str, dtype: torch.dtype) -> LayerProblem:
        weight, dense, pruned = self.drawn
        halves = [Moments(weight.shape[1], dtype, device) for _ in range(2)]
        whole = Moments(weight.shape[1], dtype, device)
        for half, x, x_pruned in zip(halves, dense.chunk(2), pruned.chunk(2), strict=True):
            half.add(x_pruned.to(device, dtype))
            whole.add(x_pruned.to(device, dtype), x.to(device, dtype))
        return LayerProblem(weight.to(device, dtype), whole, pattern, folds=tuple(halves))

    @cached_property
    def exact(self) -> LayerProblem:
        """The problem in float64 on the CPU, the reference of all answers."""
        return self.problem(Unstructured(0.5), "cpu", torch.float64)


def checks_of_answers(sizes: Sizes) -> Iterator[Check]:
    group = Group(sizes)
    patterns: dict[str, Constraint] = {"": Unstructured(0.5), " 2:4": SemiStructured(2, 4)}
    if sizes.device.startswith("cuda"):
        yield Check("kernels", "compiler", partial(compiler, sizes.device))
    yield Check("kernels", "parts", partial(products_in_parts, sizes.device))
    for dtype in (torch.float32, torch.bfloat16):
        yield Check("answers", f"second moments of {str(dtype)[6:]}", partial(second_moments, group, dtype))
    for name in (name for name, method in METHODS.items() if method.whole_only is None):  # the others solve nothing
        usual = patterns[""] if name in PRUNERS else Columns(0.5)  # all that the others can take
        for suffix, pattern in patterns.items() if name in ("convex", "admm") else [("", usual)]:
            yield Check("answers", name + suffix, partial(answer, group, name, pattern))
    for suffix, pattern in patterns.items():
        yield Check("determinism", f"convex{suffix}", partial(determined, group, pattern))


def compiler(device: str) -> Measurement:
    why = eager_because(device)
    return Measurement(why or "kernels are compiled", {}, why is None)


def products_in_parts(device: str) -> Measurement:
    """Check the product of parts, used by certificates, against float64 and its error bound."""
    random = torch.Generator(device).manual_seed(1)
    a, b = (torch.randn(256, 256, generator=random, device=device, dtype=torch.float64) for _ in range(2))
    left, right = Parts.of(a, OF_RESIDUAL, 1), Parts.of(b, OF_RESIDUAL, 0)
    wrong = (product_of_parts(left, right, OF_RESIDUAL) - a @ b).abs()
    ratio = float((wrong / error_of_parts(left, right, OF_RESIDUAL)).max())
    return Measurement(f"products of parts are off by {ratio:.2f} of their bound", {"off": ratio}, ratio <= 1)


def second_moments(group: Group, dtype: torch.dtype) -> Measurement:
    """Compare second moments in a number format with float64, in units of the diagonal."""
    x, device = group.drawn[1].to(dtype), group.sizes.device
    moments, exact = Moments(x.shape[1], device=device), Moments(x.shape[1], torch.float64)
    moments.add(x.to(device))
    exact.add(x)
    unit = exact.gram.diagonal().sqrt()
    apart = float(((moments.gram.cpu().double() - exact.gram).abs() / unit / unit[:, None]).max())
    return Measurement(f"differ by {apart:.1e} from those in float64", {"apart": apart}, apart <= LARGEST_ROUNDING)


def answer(group: Group, name: str, pattern: Constraint) -> Measurement:
    """Check the zeros, the gap and the error of a method's answer against float64 on the CPU."""
    edit = METHODS[name]().prune(group.problem(pattern, group.sizes.device, torch.float32))
    exact = METHODS[name]().prune(group.problem(pattern, "cpu", torch.float64))
    errors = [float(group.exact.squared_error(one.weight.cpu().double()).sum()) for one in (edit, exact)]
    difference, zeros = errors[0] / errors[1] - 1, int((edit.weight == 0).sum())
    asked = pattern.zeros(*group.sizes.group)
    gap, gap_exact = _gap(edit), _gap(exact)
    said = f"error {difference:+.2%} of float64's, {zeros:,} zeros of {asked:,} asked"
    numbers: dict[str, float] = {"difference": difference, "zeros": zeros, "asked": asked}
    if gap is not None:
        said, numbers = f"{said}, gap {gap:.1e}", numbers | {"gap": gap}
    near = abs(difference) <= LARGEST_DIFFERENCE and zeros == asked
    return Measurement(said, numbers, near and (gap or 0) <= max(LARGEST_GAP, 1.1 * (gap_exact or 0)))


def _gap(edit: LayerEdit) -> float | None:
    """Return the gap of the last solve. A published method may stop at a larger gap."""
    return edit.solutions[-1].certificate.relative_gap if edit.solutions else None


def determined(group: Group, pattern: Constraint) -> Measurement:
    """Run the default method twice under `torch.use_deterministic_algorithms(True)` and compare the bits."""
    problem = group.problem(pattern, group.sizes.device, torch.float32)
    states = torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    with restored(*states, True):  # torch refuses operations whose bits can change from run to run
        first, second = (PRUNERS["convex"]().prune(problem).weight for _ in range(2))
    differ = int((first != second).sum())
    return Measurement(f"{differ} of {first.numel():,} entries differ", {"differ": differ}, differ == 0)
