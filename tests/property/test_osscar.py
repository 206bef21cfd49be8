"""Group OBS and OSSCAR: the slow twins are least squares, done again for every column that might go."""

from collections.abc import Iterable

import pytest
import torch
from pruning_cases import correlated, layer_problem
from strategies import make_layer
from torch import Tensor

from convexprune.constraints import Columns, SemiStructured, Stacked, Unstructured
from convexprune.core._moments import Moments
from convexprune.errors import PatternError, PruningError
from convexprune.pruners import OSSCAR, LayerProblem, Refitted, Wanda, WandaSP
from convexprune.pruners._baselines.osscar import backward, best, exchange, explained


def damped(problem: LayerProblem, damping: float) -> tuple[Tensor, Tensor]:
    gram = problem.quadratic.gram.clone()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return gram, problem.weight @ gram + problem.quadratic.cross


def error(gram: Tensor, target: Tensor, kept: list[int]) -> float:
    """1/2 tr(V H V') - tr(V G') of the best V on some columns, row by row."""
    total = 0.0
    for row in target:
        solved = torch.linalg.solve(gram[kept][:, kept], row[kept])
        total += float(solved @ gram[kept][:, kept] @ solved) / 2 - float(solved @ row[kept])
    return total


def columns_of(blocks: Iterable[int], block: int) -> list[int]:
    return [k * block + i for k in sorted(blocks) for i in range(block)]


def slow_backward(gram: Tensor, target: Tensor, count: int, block: int) -> list[int]:
    kept = set(range(len(gram) // block))
    for _ in range(count):
        kept.remove(min(kept, key=lambda j: error(gram, target, columns_of(kept - {j}, block))))
    return columns_of(kept, block)


def test_no_more_columns_are_exchanged_than_there_are():
    problem = layer_problem(make_layer("full rank", 4, 8, 0, change=0.5), Columns(0.75))
    pruned = OSSCAR(exchanged=1.0).prune(problem)
    assert problem.pattern.violation(pruned.weight) == 0 and int(pruned.mask.sum()) == 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 2])
def test_columns_go_one_by_one_where_least_squares_misses_them_least(seed: int, block: int):
    problem = layer_problem(make_layer("full rank", 4, 8, seed, change=0.5), Columns(0.5, block=block))
    gram, target = damped(problem, 0.01)
    count = len(gram) // 2 // block
    kept = slow_backward(gram, target, count, block)
    assert backward(gram, target, count, block).nonzero().flatten().tolist() == kept
    pruned = OSSCAR(exchanged=0.0).prune(problem)
    assert [j for j in range(len(gram)) if pruned.mask[:, j].all()] == kept and problem.pattern.violation(
        pruned.weight
    ) == 0
    expected = torch.zeros_like(target)
    expected[:, kept] = torch.linalg.solve(gram[kept][:, kept], target[:, kept].T).T
    torch.testing.assert_close(pruned.weight, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block", "blocks"), [(1, {1, 3, 4, 8, 9, 10, 12, 15}), (2, {0, 2, 5, 7})])
def test_an_exchange_drops_what_costs_least_and_takes_what_gains_most(seed: int, block: int, blocks: set[int]):
    gram, target = damped(layer_problem(correlated(seed), Columns(0.5)), 0.01)

    def without(j: int) -> float:
        return error(gram, target, columns_of(blocks - {j}, block))

    kept = columns_of(blocks, block)
    mask = torch.zeros(16, dtype=torch.bool)
    mask[kept] = True
    left = blocks - {*sorted(blocks, key=without)[:2]}
    free = {*range(16 // block)} - left
    taken = sorted(free, key=lambda j: error(gram, target, columns_of(left | {j}, block)))[:2]
    assert exchange(gram, target, mask, 2, block).nonzero().flatten().tolist() == columns_of(left | {*taken}, block)
    assert explained(gram, target, mask) == pytest.approx(-error(gram, target, kept))
    assert float((best(gram, target, mask) * target).sum()) == pytest.approx(-2 * error(gram, target, kept))


def test_exchanges_never_raise_the_error_and_sometimes_lower_it():
    gains = []
    for seed in range(20):
        problem = layer_problem(correlated(seed, m=6, n=16), Columns(0.5))
        gram, target = damped(problem, 0.01)
        values = [explained(gram, target, OSSCAR(exchanged=e).prune(problem).mask[0]) for e in (0.0, 0.3)]
        gains.append(values[1] - values[0])
    assert min(gains) >= 0 and max(gains) > 0


def test_each_operator_of_a_stack_chooses_for_itself():
    pattern = Stacked((Columns(0.25), Columns(0.5)), (3, 5))
    problem = layer_problem(correlated(0), pattern)
    parts = [OSSCAR().prune(part).weight for part in problem.operators()]
    torch.testing.assert_close(OSSCAR().prune(problem).weight, torch.cat(parts))


def test_wanda_sp_is_its_formula_by_hand():
    # |X_j| = (5, 1): scores [[5, 9], [5, 0]]; the sums are 10 and 9, the roots of the sums of squares 7.1 and 9.
    weight, moments = torch.tensor([[1.0, 9.0], [-1.0, 0.5]]), Moments(2)
    moments.add(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    problem = LayerProblem(weight, moments, Columns(0.5))
    assert WandaSP().prune(problem).weight.tolist() == [[1.0, 0.0], [-1.0, 0.0]]
    assert Wanda().prune(problem).weight.tolist() == [[0.0, 9.0], [0.0, 0.5]]
    # Of blocks the sums count, 3.1 and 4, and not those of squares, 9 and 8.
    weight, moments = torch.tensor([[3.0, 0.1, 2.0, 2.0]]), Moments(4)
    moments.add(torch.eye(4))
    problem = LayerProblem(weight, moments, Columns(0.5, block=2))
    assert WandaSP().prune(problem).weight.tolist() == [[0.0, 0.0, 2.0, 2.0]]


def test_what_it_cannot_do_is_refused():
    for pattern in (Unstructured(0.5), SemiStructured(2, 4)):
        with pytest.raises(PatternError, match="removes whole columns"):
            OSSCAR().require(pattern)
        with pytest.raises(PatternError, match="or another method"):
            WandaSP().require(pattern)
    for pruner in (OSSCAR(), WandaSP()):
        for pattern in (SemiStructured(1, 2), SemiStructured(2, 4), Unstructured(0.5)):
            with pytest.raises(PatternError, match="removes whole columns"):
                pruner.prune(layer_problem(correlated(0, n=6), pattern))
    with pytest.raises(PruningError, match="raise the damping"):
        OSSCAR(damping=0.0).prune(layer_problem(correlated(0, tokens=6), Columns(0.5)))


def test_a_refit_takes_what_its_pruner_takes():
    Refitted(OSSCAR()).require(Columns(0.5))
    with pytest.raises(PatternError, match="OSSCAR removes whole columns"):
        Refitted(OSSCAR()).require(Unstructured(0.5))
