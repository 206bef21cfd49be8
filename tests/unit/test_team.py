"""Ranks that prune each layer together: sums over shares are those of the whole. Here they are threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from strategies import seeds
from torch import Tensor

from convexprune import errors
from convexprune.pattern import SemiStructured, Stacked, Unstructured
from convexprune.pipeline.folds import Folds
from convexprune.pipeline.team import Spread, Team
from convexprune.pruners import ADMM, ALPS, Convex, Pruned, PruningProblem, Refitted, SparseGPT
from convexprune.solvers.cg import ConjugateGradient

EXACT = ConjugateGradient(tolerance=1e-12, scale=False)  # which stops by the gap of the rows that it has
T = TypeVar("T")


@dataclass(frozen=True)
class Threads(Team):
    """A team of threads of this process."""

    told: dict[int, Tensor] = field(default_factory=dict)
    barrier: Barrier = field(default_factory=lambda: Barrier(1))

    def total(self, tensor: Tensor) -> Tensor:
        self.told[self.rank] = tensor.clone()
        self.barrier.wait(20)
        assert len({(t.shape, t.dtype) for t in self.told.values()}) == 1
        tensor.copy_(torch.stack(list(self.told.values())).sum(0))
        self.barrier.wait(20)
        return tensor


def in_a_team(size: int, work: Callable[[Team], T]) -> list[T]:
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


def stacked(seed: int, *patterns: Any, heights: tuple[int, ...] = (5, 2, 4)) -> PruningProblem:
    """One pattern for all operators, or one for each."""
    layer = correlated(seed, m=sum(heights), change=0.3)
    each = patterns * (len(heights) // len(patterns))
    return layer_problem(layer, Stacked(each, heights))


shares = st.sampled_from([0.0, 0.3, 0.5, 0.9])


@given(seed=seeds, size=st.integers(2, 5), sparsities=st.lists(shares, min_size=4, max_size=4))
def test_spread_rows_have_the_mask_and_the_threshold_of_the_whole(seed: int, size: int, sparsities: list[float]):
    heights = (700, 1, 40, 59)
    whole = Stacked(tuple(map(Unstructured, sparsities)), heights)
    scores = torch.randn(sum(heights), 160, generator=torch.Generator().manual_seed(seed))  # the first is sampled

    def mine(team: Team) -> tuple[Tensor, Tensor]:
        rows = team.share(sum(heights))
        spread = Spread(whole, rows, 160, team)
        return spread.mask(scores[rows].abs()), spread.threshold(scores[rows])

    masks, thresholds = zip(*in_a_team(size, mine), strict=True)
    assert torch.equal(torch.cat(masks), whole.mask(scores.abs()))
    assert torch.equal(torch.cat(thresholds), whole.threshold(scores)[:, :1])


@pytest.mark.parametrize(
    "patterns",
    [
        (Unstructured(0.65),),
        (Unstructured(0.5, "row"),),
        (SemiStructured(2, 4),),
        tuple(map(Unstructured, (0.3, 0.8, 0.5))),
        (SemiStructured(3, 4), SemiStructured(1, 4), SemiStructured(2, 4)),
    ],
    ids=lambda patterns: ", ".join(map(str, patterns)),
)
@pytest.mark.parametrize(
    "pruner",
    [Convex(EXACT), ADMM(EXACT), SparseGPT(block=8), Refitted(SparseGPT(), EXACT)],
    ids=lambda p: type(p).__name__,
)
@settings(max_examples=5)
@given(seed=seeds, size=st.integers(2, 3))
def test_a_team_finds_what_one_process_finds(pruner, patterns, seed: int, size: int):
    """In float64, where a sum in another order changes no choice."""
    problem = stacked(seed, *patterns)
    alone = pruner.prune(problem)
    assert pruner.by_rows
    for pruned in in_a_team(size, lambda team: team.prune(pruner, problem, team.part(problem))):
        assert torch.equal(pruned.mask, alone.mask)
        torch.testing.assert_close(pruned.weight, alone.weight, rtol=0, atol=1e-5 * float(alone.weight.abs().max()))
        assert_certified(pruned, alone)


def assert_certified(pruned: Pruned, alone: Pruned) -> None:
    """The certificates hold for all rows: lower bounds are below, and values above, those of one process."""
    assert len(pruned.solutions) == len(alone.solutions) and pruned.facts == alone.facts
    for one, other in zip(pruned.solutions, alone.solutions, strict=True):
        mine, whole = one.certificate, other.certificate
        assert mine.dual <= whole.primal * (1 + 1e-9) and whole.dual <= mine.primal * (1 + 1e-9)
        assert mine.primal == pytest.approx(whole.primal, rel=1e-9)


def test_what_cannot_be_spread_by_rows_is_solved_by_all_and_is_the_same():
    problem, pruner = stacked(0, Unstructured(0.5)), ALPS()
    alone = pruner.prune(problem)
    for pruned in in_a_team(3, lambda team: team.prune(pruner, problem, team.part(problem))):
        assert torch.equal(pruned.weight, alone.weight) and torch.equal(pruned.mask, alone.mask)


def test_fewer_rows_than_ranks_are_pruned_by_all():
    problem, pruner = stacked(0, Unstructured(0.5), heights=(1, 1)), Convex()
    for pruned in in_a_team(3, lambda team: team.prune(pruner, problem, team.part(problem))):
        assert torch.equal(pruned.weight, pruner.prune(problem).weight)


@pytest.mark.parametrize("outputs", [None, 5])
@given(seed=seeds, samples=st.integers(3, 8), held_out=st.integers(0, 3), size=st.integers(2, 3))
def test_moments_add_up_to_those_of_all_samples(outputs, seed: int, samples: int, held_out: int, size: int):
    """The halves, too, are those of one process."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (samples + held_out, 7, 6), generator=draw).float()  # sums of integers are exact
    d = torch.randint(-3, 4, (samples + held_out, 7, outputs or 6), generator=draw).float()

    def counted(team: Team) -> Folds:
        folds = Folds(6, torch.device("cpu"), outputs)
        for i in range(samples)[team.share(samples)]:
            folds.add(x[i : i + 1], d[i : i + 1], held_out=False)
        for i in range(samples, samples + held_out)[team.share(held_out)]:
            folds.add(x[i : i + 1], d[i : i + 1], held_out=True)
        folds.add_up(team)
        return folds

    alone = counted(Team())
    for folds in in_a_team(size, counted):
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
    def counted(team: Team) -> None:
        folds = Folds(4, torch.device("cpu"), outputs=3 if team.rank else None)
        with pytest.raises(errors.PruningError, match="do not see the same operator"):
            folds.add_up(team)

    in_a_team(2, counted)
