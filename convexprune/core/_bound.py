"""A certified lower bound on the error of the best weight in a pattern."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf

import torch
from torch import Tensor

from convexprune._setting_types import between
from convexprune.constraints import Budget, Constraint
from convexprune.core._quadratic import Quadratic
from convexprune.core._relaxation import Relaxed, first_split, fit_split, relax, safe_split
from convexprune.core._side_by_side import SideBySide
from convexprune.errors import ProblemError


@dataclass(frozen=True)
class PruningBound:
    """A lower bound on the error of any weight in a pattern."""

    error: float  # mean |V x* - target|^2 of the pruned weight, summed over rows
    lower: float  # no weight in the pattern with equally many non-zeros has a lower error on these rows
    rows: int

    @property
    def ratio(self) -> float:
        """lower / error in [0, 1]: at least this part of the error is unavoidable. 1 where both are zero."""
        return self.lower / self.error if self.error > 0 else 1.0


@dataclass(frozen=True)
class LowerBound:
    """The perspective relaxation of the cardinality-constrained problem, with a fitted split.

    Take a diagonal split B >= 0 with H - B positive semidefinite. At any weight V0 with negative gradient K,

        q(V) >= q(V0) - <K, V - V0> + 1/2 sum_j B_j (V_j - V0_j)^2

    and the right-hand side is separable: its least value over a pattern that keeps k units of a line (entries of a row,
    of a group of n:m, or of all rows; whole columns) has a closed form (`lower_bound`). So any V0 and any split give a
    valid bound. The best V0 minimises the perspective relaxation (reverse Huber; Pilanci, Wainwright and El Ghaoui
    2015; Dong, Chen and Linderoth 2015, arXiv 1510.06083), the best split is the dual of its semidefinite relaxation. A
    round makes some iterations of ADMM on V0 (`relax`), and then a Newton step on

        max_B  <c, B> + barrier log det(H - B),     c_j = V_j^2 (1 / z_j - 1) / 2

    where c is the derivative of the relaxed value, concave in B.
    """

    rounds: int = 12
    iterations: int = 20
    last_iterations: int = 100  # after the last round
    barriers: tuple[float, float] = (1.0, 1e-2)  # first and last, in units of <c, B> / n; they fall geometrically
    per_row: bool = True  # a split for every row: tighter, at four factorisations [n n] a row and round

    @torch.no_grad()
    def of(self, quadratic: Quadratic, pattern: Constraint, weight: Tensor) -> PruningBound:
        """Bound the error of a pruned weight [m n], whose rows may be a sample of an operator's rows.

        A quota of the whole matrix then means the number of non-zeros that the weight has in these rows.
        """
        return self.of_all([(quadratic, [pattern], [weight])])[0][0]

    @torch.no_grad()
    def of_all(
        self, stacks: Sequence[tuple[Quadratic, Sequence[Constraint], Sequence[Tensor]]]
    ) -> list[list[PruningBound]]:
        """Bound stacks of operators, whose rows a quadratic has in order; those of equal shape side by side."""
        posed = [_posed(*stack) for stack in stacks]
        every = [operator for stack in posed for operator in stack]
        single = self.per_row or len(stacks) < 2 or len({operator.kind for operator in every}) > 1
        found = (self._bounds(part) for part in ([[operator] for operator in every] if single else [every]))
        bounds = chain.from_iterable(found)
        return [[next(bounds) for _ in stack] for stack in posed]

    def _bounds(self, every: "Sequence[_Operator]") -> list[PruningBound]:
        """Bound an operator, or operators of equal shape side by side with a split for all rows of each."""
        if every[0].first is None:
            return [PruningBound(operator.error, 0.0, len(operator.weight)) for operator in every]
        (inverse, split), q = every[0].first, every[0].quadratic
        weight, kept = (torch.cat([getattr(operator, name) for operator in every]) for name in ("weight", "kept"))
        if len(every) == 1:
            split = split.expand(weight.shape) if self.per_row else split[None]
        else:
            q = SideBySide.of([operator.quadratic for operator in every])
            inverse, split = (torch.stack(each) for each in zip(*(o.first for o in every if o.first), strict=True))
        split, point = self._ascend(q, inverse, split, replace(every[0], weight=weight, kept=kept))
        splits = q.by_block(split if self.per_row else q.for_rows(split))
        each = zip(every, splits, q.by_block(point), strict=True)
        return [operator.bound(own, at, self.rounds > 0) for operator, own, at in each]

    def _ascend(self, q: Quadratic, inverse: Tensor, split: Tensor, posed: "_Operator") -> tuple[Tensor, Tensor]:
        """Return the split, by row [m n] or operator [e n], and the weight V0 [m n] with the best bound."""
        found, budget, kept = Relaxed.at(posed.weight), posed.budget, posed.kept

        def of_rows(split: Tensor) -> Tensor:
            return split if self.per_row else q.for_rows(split)

        for number in range(self.rounds):
            found = relax(q, inverse, of_rows(split), found, budget, kept, self.iterations)
            gain = found.gain if self.per_row else q.by_block(found.gain).mean(1)
            barrier, before = between(self.barriers, number / max(1, self.rounds - 1)), of_rows(split)
            each = zip(q.gram.expand(len(split), -1, -1), split, gain, strict=True)
            split = torch.stack([fit_split(gram, own, its, barrier) for gram, own, its in each])
            found = found.moved(before, of_rows(split))
        return split, relax(q, inverse, of_rows(split), found, budget, kept, self.last_iterations).point


@dataclass(frozen=True, eq=False)
class _Operator:
    """An operator to bound, in coordinates in which H has a unit diagonal."""

    quadratic: Quadratic
    first: tuple[Tensor, Tensor] | None  # the inverse of H, and the first split; None if H is singular
    weight: Tensor
    budget: Budget
    kept: Tensor
    error: float

    @property
    def kind(self) -> tuple[object, ...]:
        """Return the key of operators that can be bounded side by side."""
        return tuple(self.weight.shape), replace(self.budget, kept=0), self.first is None

    def bound(self, split: Tensor, point: Tensor, fitted: bool) -> PruningBound:
        """Return the bound at a point, by a split; a `fitted` split is proven here."""
        proven = safe_split(self.quadratic.gram, split) if fitted else split
        lower = lower_bound(self.quadratic, proven, point, self.budget, self.kept)
        return PruningBound(self.error, 2 * lower, len(self.weight))


def _posed(quadratic: Quadratic, patterns: Sequence[Constraint], weights: Sequence[Tensor]) -> list[_Operator]:
    weight = torch.cat(list(weights))
    if tuple(weight.shape) != quadratic.shape:
        raise ProblemError(f"The weight is {list(weight.shape)}; this quadratic needs {list(quadratic.shape)}.")
    budgets = [budget_of(pattern, part) for pattern, part in zip(patterns, weights, strict=True)]
    heights = [len(part) for part in weights]
    errors = [2 * float(part.sum()) for part in quadratic.double.values(weight.double()).split(heights)]
    q = without_dead_inputs(quadratic.double)
    scale = q.scale()
    q = q.scaled(scale)
    first = first_split(q.gram)
    return [
        _Operator(q.rows(rows), first, weight[rows].double() * scale, *budget, error)
        for rows, budget, error in zip(torch.arange(len(weight)).split(heights), budgets, errors, strict=True)
    ]


def budget_of(pattern: Constraint, weight: Tensor) -> tuple[Budget, Tensor]:
    """Return the budget of a weight, and the number of non-zero units allowed per line [lines 1]."""
    budget = pattern.budget(weight.shape)
    if budget is None:
        raise ProblemError(f"A bound needs a pattern of one operator that counts its zeros; this is {pattern}.")
    counts = budget.sums(weight != 0).count_nonzero(1)
    is_sampled = budget.by_entry and not pattern.by_row  # the rows are a sample of those that compete
    kept = int(counts) if is_sampled else budget.kept
    if bool((counts > kept).any()):
        raise ProblemError(
            f"The weight keeps up to {int(counts.max())} in a line of {budget.width}; {pattern} keeps {kept}."
        )
    return budget, torch.full((len(counts), 1), kept, dtype=torch.float64, device=weight.device)


def without_dead_inputs(q: Quadratic) -> Quadratic:
    """Add 1/2 |V|^2 on the inputs that are always zero: the best pruning has zeros there."""
    dead = q.gram.diagonal() == 0
    if not bool(dead.any()):
        return q
    q = q.at(None if q.anchor is None else q.anchor.masked_fill(dead, 0))
    return type(q)(q.gram + dead.to(q.gram).diag(), q.cross, q.energy, q.anchor, checked=False)


def lower_bound(q: Quadratic, split: Tensor, weight: Tensor, budget: Budget, kept: Tensor) -> float:
    """Return a bound below q(V), summed over rows, for every V in the pattern, from any weight V0 [m n].

        q(V0) + sum_ij (K V0 + 1/2 B V0^2)_ij - (the `kept` largest of each line, of the units' sums of
                                                  (K + B V0)^2 / 2 B)

    Each row of the split B [m n] is proven to be below H. A bound on the rounding of all that (float64) is subtracted.
    """
    residual = q.residual(weight)
    values = q.values(weight, residual)
    fixed = residual * weight + split * weight.square() / 2  # the cost of an entry that is zero
    gain = torch.where(split > 0, (residual + split * weight).square() / (2 * split), inf)  # of one that is kept
    gain = torch.where((split == 0) & (residual == 0), 0.0, gain)
    largest = budget.sums(gain).sort(dim=1, descending=True).values.cumsum(1)
    count = kept.long()
    gained = torch.where(count > 0, largest.gather(1, (count - 1).clamp_min(0)), 0.0)
    longest = max(q.shape[1], budget.width + budget.rows * budget.block)
    unit = 4 * (longest + 4) * torch.finfo(weight.dtype).eps
    moved = q.displacement(weight).abs()
    residual_terms = q.cross.abs() + moved @ q.gram.abs()  # the residual is wrong by `unit` times this at most
    lengths = weight.abs() + residual.abs() / split.clamp_min(torch.finfo(weight.dtype).tiny) + moved
    terms = (residual_terms * lengths).sum() + q.energy.sum() + values.sum() + fixed.abs().sum() + gained.sum()
    bound = float(values.sum() + fixed.sum() - gained.sum()) - unit * float(terms)
    return bound if bound > 0 else 0.0  # also where it is not a number: the error is a sum of squares
