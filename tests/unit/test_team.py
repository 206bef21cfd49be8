"""Ranks that prune each layer together: sums over shares are those of the whole. Here they are threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from strategies import seeds
from torch import Tensor

from convexprune import errors
from convexprune._layerwise.processes import ProcessGroup, of_first_rank
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune.constraints import Unstructured
from convexprune.pruners import Convex, LayerEdit

T = TypeVar("T")


@dataclass(frozen=True)
class Threads(ProcessGroup):
    """Threads of this process in place of ranks."""

    told: dict[int, Tensor] = field(default_factory=dict)
    barrier: Barrier = field(default_factory=lambda: Barrier(1))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.told[self.rank] = tensor.clone()
        self.barrier.wait(20)
        assert len({(t.shape, t.dtype) for t in self.told.values()}) == 1
        tensor.copy_(torch.stack(list(self.told.values())).sum(0))
        self.barrier.wait(20)
        return tensor


def in_a_group(size: int, work: Callable[[ProcessGroup], T]) -> list[T]:
    """What each rank makes of it."""
    told, barrier = dict[int, Tensor](), Barrier(size)

    def of_rank(rank: int) -> T:
        try:
            return work(Threads(rank, size, told, barrier))
        except BaseException:  # what pytest raises is no Exception
            barrier.abort()  # nobody waits for who does not come
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, range(size)))


@given(seed=seeds, size=st.integers(2, 4))
@settings(max_examples=5)
def test_all_ranks_take_the_answer_of_the_first(seed: int, size: int):
    """Even if a rank's own processor rounds in another way."""
    problem, pruner = layer_problem(correlated(seed, m=5, change=0.3), Unstructured(0.5)), Convex()

    def pruned_by(ranks: ProcessGroup) -> LayerEdit:
        own = replace(problem, weight=problem.weight * (1 + 1e-3 * ranks.rank))
        return of_first_rank(pruner.prune(own), ranks)

    alone = pruner.prune(problem)
    for pruned in in_a_group(size, pruned_by):
        assert torch.equal(pruned.weight, alone.weight) and torch.equal(pruned.mask, alone.mask)
        assert len(pruned.solutions) == len(alone.solutions) and pruned.facts.keys() == alone.facts.keys()


@pytest.mark.parametrize("outputs", [None, 5])
@given(seed=seeds, samples=st.integers(3, 8), held_out=st.integers(0, 3), size=st.integers(2, 3))
def test_moments_add_up_to_those_of_all_samples(outputs, seed: int, samples: int, held_out: int, size: int):
    """The halves, too, are those of one process."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (samples + held_out, 7, 6), generator=draw).float()  # sums of integers are exact
    d = torch.randint(-3, 4, (samples + held_out, 7, outputs or 6), generator=draw).float()

    def counted(ranks: ProcessGroup) -> CalibrationStatistics:
        folds = CalibrationStatistics(6, torch.device("cpu"), outputs)
        for i in range(samples)[ranks.local_slice(samples)]:
            folds.add(x[i : i + 1], d[i : i + 1], held_out=False)
        for i in range(samples, samples + held_out)[ranks.local_slice(held_out)]:
            folds.add(x[i : i + 1], d[i : i + 1], held_out=True)
        folds.add_up(ranks)
        return folds

    alone = counted(ProcessGroup())
    for folds in in_a_group(size, counted):
        halves = zip(folds.halves, alone.halves, strict=True)
        assert all(mine.tokens == whole.tokens and torch.equal(mine.gram, whole.gram) for mine, whole in halves)
        assert folds.tokens == 7 * samples
        pairs = [(folds.total, alone.total)] + ([(folds.held_out, alone.held_out)] if held_out else [])
        for mine, whole in pairs:
            assert mine.tokens == whole.tokens
            torch.testing.assert_close(mine.gram, whole.gram)
            torch.testing.assert_close(mine.cross, whole.cross)
            torch.testing.assert_close(mine.change, whole.change)


def test_ranks_that_count_different_things_say_so():
    def counted(ranks: ProcessGroup) -> None:
        folds = CalibrationStatistics(4, torch.device("cpu"), outputs=3 if ranks.rank else None)
        with pytest.raises(errors.PruningError, match="do not see the same operator"):
            folds.add_up(ranks)

    in_a_group(2, counted)
