"""Ranks that prune one decoder layer together: each counts a share of the samples and prunes a share of the rows."""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import accumulate, pairwise
from os import environ

import torch
import torch.distributed as dist
from torch import Tensor

from convexprune.errors import PruningError, RecipeError
from convexprune.pattern import AbstractPattern, Stacked, Unstructured, sample_step
from convexprune.problem import Certificate
from convexprune.pruners import AbstractPruner, Pruned, PruningProblem
from convexprune.solvers import Solution, Status

PATIENCE = timedelta(hours=6)  # one rank may have to compute again what enters a layer; the others wait
MEETING = ("MASTER_ADDR", "MASTER_PORT")
ENDS = tuple(Status)  # the worst one last


def require_meeting() -> None:
    """Refuse ranks that do not know where they meet.

    Raises:
        RecipeError: the launcher has not said so.
    """
    if missing := [name for name in MEETING if name not in environ]:
        raise RecipeError(
            f"executor='ranks' with prefix='pruned': the ranks prune each layer together, and {', '.join(missing)} "
            "must say where they meet. torchrun sets them; with srun, set them to the first node and a free port."
        )


@dataclass(frozen=True)
class Team:
    """Rank `rank` of `size` that all go the same way; alone, what is summed over the ranks is what it was.

    All that they tell each other are sums, in `total`, which every rank has to ask for equally often.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def met(cls, rank: int, size: int) -> Iterator["Team"]:
        """Inside, the ranks of a launcher can talk to each other; see `require_meeting`."""
        if size == 1 or dist.is_initialized():  # by the script that prunes
            yield cls(rank, size)
            return
        dist.init_process_group(rank=rank, world_size=size, timeout=PATIENCE)
        try:
            yield cls(rank, size)
        finally:
            dist.destroy_process_group()

    def share(self, count: int) -> slice:
        """Which of `count` items, one behind the other, fall to this rank."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place.

        Raises:
            PruningError: another rank was lost.
        """
        if self.size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:
                raise PruningError(
                    "Another rank of this run was lost. What is finished is kept: start all of them again."
                ) from error
        return tensor

    def whole(self, mine: Tensor, count: int) -> Tensor:
        """All rows [count ...] of a tensor of which every rank has its own."""
        if self.size == 1:
            return mine
        everywhere = mine.new_zeros(count, *mine.shape[1:])
        everywhere[self.share(count)] = mine
        return self.total(everywhere)

    def part(self, problem: PruningProblem) -> PruningProblem:
        """The rows of this rank of a problem of stacked operators."""
        if self.size == 1:
            return problem
        stack, rows = problem.pattern, self.share(len(problem.weight))
        assert isinstance(stack, Stacked)
        own = stack.rows(rows) if stack.by_row else Spread(stack, rows, problem.weight.shape[1], self)
        return problem.rows(rows, own)

    def prune(self, pruner: AbstractPruner, problem: PruningProblem, part: PruningProblem) -> Pruned:
        """What the pruner makes of the problem; if it can, each rank prunes its `part` of the rows.

        The certificates are then those of all rows: a sum of gaps, and the largest KKT residual of any rank, which is
        no less than that of the whole. If it cannot, every rank prunes all rows, and they agree on one of the answers.
        """
        count = len(problem.weight)
        if self.size == 1:
            return pruner.prune(problem)
        if pruner.by_rows and count >= self.size:
            pruned = pruner.prune(part)
            mine, solutions = slice(None), tuple(self._of_all_rows(solution) for solution in pruned.solutions)
        else:
            pruned = pruner.prune(problem)
            mine, solutions = self.share(count), pruned.solutions
        weight = self.whole(pruned.weight[mine], count)
        mask = self.whole(pruned.mask[mine].to(torch.uint8), count).bool()
        return replace(pruned, weight=weight, mask=mask, solutions=solutions)

    def _of_all_rows(self, solution: Solution) -> Solution:
        mine = solution.certificate
        worst = (mine.kkt_residual, ENDS.index(solution.status), solution.iterations, solution.products)
        table = solution.weight.new_zeros(self.size, 2 + len(worst), dtype=torch.float64)
        table[self.rank] = torch.tensor([mine.primal, mine.gap, *worst], dtype=table.dtype)
        self.total(table)
        primal, gap = table[:, :2].sum(0).tolist()
        kkt, end, iterations, products = table[:, 2:].amax(0).tolist()
        return replace(
            solution.record(),
            status=ENDS[int(end)],
            certificate=Certificate(primal, gap, kkt),
            iterations=int(iterations),
            products=int(products),
        )


ALONE = Team()


@dataclass(frozen=True, eq=False)
class Spread(AbstractPattern):
    """The pattern of a stack of operators of which this rank has the `rows`, one quota for all rows of an operator."""

    whole: Stacked
    rows: slice
    columns: int
    team: Team

    def check(self, rows: int, columns: int) -> None:
        self.whole.check(sum(self.whole.heights), columns)

    def zeros(self, rows: int, columns: int) -> int:
        """Those in the rows of all ranks."""
        return self.whole.zeros(sum(self.whole.heights), columns)

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return self.whole.mask(self.team.whole(scores, sum(self.whole.heights)), first)[self.rows]

    def threshold(self, scores: Tensor) -> Tensor:
        """See `AbstractPattern.threshold`: the same sample of each operator as in one process."""
        lengths, before, mine = self._sampled
        flat, sample = scores.reshape(-1), scores.new_zeros(sum(lengths))
        known = torch.cat([flat[part] for part in mine])
        sample[before : before + len(known)] = known
        levels = list[Tensor]()
        lines = self.team.total(sample).split(lengths)
        for pattern, line, height in zip(self.whole.patterns, lines, self.whole.heights, strict=True):
            assert isinstance(pattern, Unstructured)
            levels.append(pattern.level(line[None], height, self.columns).expand(height, 1))
        return torch.cat(levels)[self.rows]

    @cached_property
    def _sampled(self) -> tuple[list[int], int, list[slice]]:
        """How long each operator's sample is, how many of all are in ranks before this one, and what is in this one."""
        first, last = self.rows.start * self.columns, self.rows.stop * self.columns
        lengths, before, mine = list[int](), 0, list[slice]()
        for begin, end in pairwise(self.columns * height for height in accumulate(self.whole.heights, initial=0)):
            entries = range(begin, end, sample_step(end - begin, self.columns))
            i, j = bisect_left(entries, first), bisect_left(entries, last)
            lengths.append(len(entries))
            before += i
            mine.append(slice(entries[i] - first, min(end, last) - first, entries.step) if i < j else slice(0))
        return lengths, before, mine

    @property
    def by_row(self) -> bool:
        return False
