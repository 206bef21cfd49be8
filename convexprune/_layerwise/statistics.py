"""The moments of an input in three disjoint parts: two halves that fit, and a part that judges."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from convexprune._device.capabilities import is_host
from convexprune._layerwise.processes import ProcessGroup
from convexprune.core import ErrorMoments, Moments
from convexprune.errors import PruningError
from convexprune.pruners import AbstractPruner

ROOM = 4 << 30  # bytes for the moments of the experts that are pruned side by side
SOLVED = 1 << 25  # numbers in weights and Gram matrices that are solved side by side: some 4 GiB while they are
FEW = 128  # tokens: a product of fewer takes most of its time to fetch and store the matrix that it is added to
HELD_OUT = 2

Counted = tuple[Tensor, Tensor | None, Tensor | None]  # x* [tokens n], what it lacks, and weights [tokens]


class CalibrationStatistics:
    """Moments of `width` inputs: calibration windows dealt to two halves, and held-out windows.

    Error moments are of all calibration windows together: the halves have only x* x*'. With `outputs` errors are of
    the m outputs (see `ErrorMoments`). With `weights` of the calibration tokens [windows length], in order, there
    are further moments in which all calibration tokens count alike; held-out tokens always do.
    """

    def __init__(
        self, width: int, device: torch.device, outputs: int | None = None, weights: Tensor | None = None
    ) -> None:
        self._halves = (Moments(width, device=device), Moments(width, device=device))
        self._held_out = Moments(width, device=device, outputs=outputs)
        self._weights = weights
        self._unweighted = None if weights is None else Moments(width, device=device, outputs=outputs)
        self._windows = 0
        self.borrowed = 0
        self._change: ErrorMoments | None = None
        self._dealt = [0, 0]  # tokens, to each half
        self._waiting: tuple[list[Counted], ...] = ([], [], [])  # for the halves, and held out

    @staticmethod
    def bytes(width: int) -> int:
        return 3 * 4 * width * width

    def add(self, x: Tensor | Sequence[Tensor], lacking: Tensor | None, held_out: bool) -> None:
        """Count inputs x* [tokens n] and errors by sample, each in the half with fewer tokens; short ones wait."""
        for i in range(len(x)):
            half = int(self._dealt[0] > self._dealt[1])
            waiting = self._waiting[HELD_OUT if held_out else half]
            if not held_out:
                self._dealt[half] += len(x[i])
            weights = None if held_out else self._next_weights(x[i].device)
            counted = x[i], None if lacking is None else lacking[i], weights
            if len(x[i]) < FEW:  # else the batch would stay in memory with them
                counted = counted[0].clone(), None if counted[1] is None else counted[1].clone(), weights
            waiting.append(counted)
            if sum(len(tokens) for tokens, *_ in waiting) >= FEW:
                self._count(HELD_OUT if held_out else half)

    def _next_weights(self, device: torch.device) -> Tensor | None:
        if self._weights is None:
            return None
        self._windows += 1
        return self._weights[self._windows - 1].to(device)

    def _count(self, part: int) -> None:
        if not (waiting := self._waiting[part]):
            return
        moments = (*self._halves, self._held_out)[part]
        x, lacking, weights = (_joined(each) for each in zip(*waiting, strict=True))
        assert x is not None
        moments.add(x, weights=weights)
        if lacking is not None and part == HELD_OUT:
            moments.add_errors(x, lacking)
        elif lacking is not None:
            self._change = self._change or ErrorMoments.zeros(moments.sum, self._held_out.outputs)
            self._change.add(x.to(moments.sum), lacking.to(moments.sum), weights)
        if self._unweighted is not None and part != HELD_OUT:
            self._unweighted.add(x)
            if lacking is not None:
                self._unweighted.add_errors(x, lacking)
        waiting.clear()

    def _count_all(self) -> None:
        for part in range(len(self._waiting)):
            self._count(part)

    @property
    def halves(self) -> tuple[Moments, Moments]:
        self._count_all()
        return self._halves

    @property
    def held_out(self) -> Moments:
        self._count_all()
        return self._held_out

    def shrink_towards(self, others: "CalibrationStatistics") -> None:
        """Fill missing tokens of an expert with tokens of all experts.

        With fewer tokens than inputs a Gram matrix is singular, and an expert without a token has none. So the mean
        moments of `others` are added, with the weight of the tokens missing to a token per input.
        """
        lacking = self.halves[0].width - self.tokens
        if lacking <= 0 or not others.tokens:
            return
        first, second = self.halves
        shared = others.total
        self.borrowed = lacking
        self._halves = (first + shared.counted_as(lacking - lacking // 2), second + shared.counted_as(lacking // 2))

    def add_up(self, ranks: ProcessGroup) -> None:
        self._count_all()
        if ranks.size == 1:
            return
        device, first_has_more = self.held_out.sum.device, torch.zeros(ranks.size, dtype=torch.int64)
        first_has_more[ranks.rank] = int(self.halves[0].tokens > self.halves[1].tokens)
        facts = [self.held_out.outputs or 0, self._change is not None, self.held_out.errors is not None]
        told, changed, judged, *odd = ranks.all_reduce(torch.tensor([*facts, *first_has_more], device=device)).tolist()
        if told != ranks.size * facts[0]:
            raise PruningError("The ranks do not see the same operator close a layer. Use error_target='operator'.")
        if sum(odd[: ranks.rank]) % 2:  # alone, the next sample would have gone to the second half
            self._halves = self._halves[1], self._halves[0]
        parts = (*self.halves, self.held_out, *([] if self._unweighted is None else [self._unweighted]))
        counts = torch.tensor([part.tokens for part in parts], dtype=torch.float64, device=device)
        for part, number in zip(parts, ranks.all_reduce(counts).tolist(), strict=True):
            part.tokens = number if self._unweighted is not None else int(number)
            ranks.all_reduce(part.sum)
        none = partial(ErrorMoments.zeros, self.held_out.sum, self.held_out.outputs)
        if changed:
            self._change = _added_up(self._change or none(), ranks)
        if changed and self._unweighted is not None:
            self._unweighted.errors = _added_up(self._unweighted.errors or none(), ranks)
        if judged:
            self.held_out.errors = _added_up(self.held_out.errors or none(), ranks)

    @property
    def tokens(self) -> int:
        """Number of calibration tokens, without borrowed tokens."""
        return int(self.unweighted.tokens) - self.borrowed

    @property
    def total(self) -> Moments:
        return (self.halves[0] + self.halves[1]).with_errors(self._change)

    @property
    def is_weighted(self) -> bool:
        return self._unweighted is not None

    @property
    def unweighted(self) -> Moments:
        self._count_all()
        return self.total if self._unweighted is None else self._unweighted

    def is_finite(self) -> bool:
        return all(part.is_finite() for part in (*self.halves, self.held_out, self._change) if part is not None)


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if len(given) > 1 else next(iter(given), None)


def _added_up(correction: ErrorMoments, ranks: ProcessGroup) -> ErrorMoments:
    ranks.all_reduce(correction.cross)
    ranks.all_reduce(correction.change)
    return correction


def at_once(shape: tuple[int, int], pruner: AbstractPruner, device: torch.device) -> int:
    """Return the number of problems to solve side by side: 1 for methods in turn, and on a CPU."""
    return many_at_once(*shape) if pruner.side_by_side and not is_host(device) else 1


def many_at_once(outputs: int, inputs: int) -> int:
    """Return the number of problems [outputs inputs] that a GPU solves side by side."""
    return max(1, SOLVED // (inputs * (outputs + inputs)))


class Paired(Protocol):
    """An item with an input, token-aligned or not (see `Group`)."""

    @property
    def token_aligned(self) -> bool: ...


Item = TypeVar("Item", bound=Paired)


def in_parts(stage: Iterable[Item], width: Callable[[Item], int]) -> list[list[Item]]:
    """Split the groups of a stage: first all token-aligned groups, then as many of the rest as fit."""
    groups = list(stage)
    parts, room = [[group for group in groups if group.token_aligned]], ROOM
    for group in groups:
        if not group.token_aligned:
            room -= CalibrationStatistics.bytes(width(group))
            if room < 0 and parts[-1]:
                parts.append([])
                room = ROOM - CalibrationStatistics.bytes(width(group))
            parts[-1].append(group)
    return [part for part in parts if part]
