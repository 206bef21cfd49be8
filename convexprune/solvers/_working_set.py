"""Projected Newton steps on working sets of the Gram matrix: for answers with few non-zero weights."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, Self

import torch
from torch import Tensor

from convexprune._setting_types import Count, NotNegative, Positive
from convexprune.core import L1, AbstractPenalty, ElasticNet, Problem
from convexprune.solvers._base import AbstractSolver, Solution, Status, certified, initial, require_penalty

FALL = 3.0  # of the strengths from a round to the next
FIRST = 8  # inputs that may enter an empty working set
AT_ONCE = 250_000  # numbers in the Gram matrices of working sets that are treated together
NEWTON_STEPS = 20  # in a round
HALVINGS = 4  # of a step that does not go down
FREE = 1e-6  # of a row's largest strength: a smaller strength is no reason to begin with larger strengths
LARGEST = 1e10  # weight, of a unit diagonal and energy
EPSILON = 1e-15  # of a gain, of a unit energy
SLIGHT = 1e-11  # of a unit diagonal and energy: rounding
SHIFT = 1e-12  # of the unit diagonal of a singular Gram matrix
ALIKE = 1.5  # sizes of working sets that are filled up to a common one


@dataclass(frozen=True)
class AbstractByRow(AbstractSolver):
    """A solver of separate rows, for penalties of entries and answers with few non-zero weights."""

    batches = "rows"

    tolerance: NotNegative = 1e-4
    max_iterations: Count = 100
    largest: Positive | None = None

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """L1, and what adds a parabola or bounds by entry."""
        return (L1, ElasticNet)


@dataclass(frozen=True)
class WorkingSet(AbstractByRow):
    """Exact solves on the few inputs that matter, row by row, in float64.

    A row starts with the strengths at which its start is optimal, and they fall by a factor of 3 a round to those that
    are asked for. A round lets the inputs that violate the optimality conditions most into the row's working set, at
    most as many as are there, and solves the problem on the set by projected Newton steps: exact on the signs of the
    weights (Bertsekas 1982). Rows leave when their gap is within the tolerance, so that a start near the answer costs a
    round or two.

    Args:
        tolerance: the requested relative gap.
        max_iterations: the largest number of rounds.
        largest: end with `ITERATION_LIMIT` where the mean working set would have more inputs.
    """

    @torch.no_grad()
    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`; without a start the weight is zero."""
        require_penalty(self, type(problem.penalty))
        began = time.perf_counter()
        quadratic, unit = problem.quadratic.unit_free
        weight = torch.zeros_like(quadratic.cross)
        if start is not None:
            weight = problem.penalty.inside(initial(problem, start)).double() * unit
        status, rounds, products = Status.FAILED, 0, 1
        if bool(quadratic.cross.isfinite().all()) and bool(quadratic.gram.isfinite().all()):
            rows = Rows.of(problem, weight)
            status, rounds, products = self._rounds(rows, quadratic.gram, weight)
        weight = problem.penalty.inside((weight / unit).to(problem.quadratic.cross))
        made = [(status, rounds, products)] * problem.quadratic.problems
        return certified(problem, weight, made, self.tolerance, began)

    def _rounds(self, rows: "Rows", gram: Tensor, weight: Tensor) -> tuple[Status, int, int]:
        """Write the rows' answers into `weight` [m n], and return status, rounds and products."""
        number = 0
        for number in range(self.max_iterations + 1):
            done = rows.done(self.tolerance)
            weight[rows.places] = rows.weight * rows.size
            rows = rows.chosen(~done)
            if not len(rows.places):
                return Status.SOLVED, number, number
            level, sizes, order = rows.working_sets()
            if number == self.max_iterations or int(sizes.sum()) > (self.largest or inf) * len(weight):
                break
            answers = torch.zeros_like(rows.weight)
            for size, chunk in _alike(sizes):
                inside = order[chunk].topk(size, sorted=False).indices
                answers[chunk] = answers[chunk].scatter_(1, inside, rows.on(gram, chunk, inside, level, self.tolerance))
            if not bool((answers.abs() < LARGEST).all()):  # H is indefinite, by rounding, where strengths are zero
                break
            residual = torch.addmm(rows.cross, answers, gram, alpha=-1)
            rows = rows._replace(weight=answers, residual=residual, level=level)
        return Status.ITERATION_LIMIT, number, number


def prices(penalty: AbstractPenalty, like: Tensor) -> list[Tensor]:
    """Return the strength, ridge, lower and upper bound of each entry [m n]."""
    assert isinstance(penalty, L1 | ElasticNet)
    rest = (0.0, -inf, inf) if isinstance(penalty, L1) else (penalty.ridge, penalty.lower, penalty.upper)
    return [torch.as_tensor(price).to(like).expand_as(like) for price in (penalty.strength, *rest)]


class Rows(NamedTuple):
    """The unfinished rows at `places`: the problem about zero for a unit diagonal, and over `size` for a unit energy.

    `level` [m 1] is the factor of the strengths for which the rows are solved.
    """

    places: Tensor
    size: Tensor
    cross: Tensor
    energy: Tensor
    strength: Tensor
    ridge: Tensor
    lower: Tensor
    upper: Tensor
    weight: Tensor
    residual: Tensor
    level: Tensor

    @classmethod
    def of(cls, problem: Problem, weight: Tensor) -> Self:
        quadratic, unit = problem.quadratic.unit_free
        quadratic, penalty = quadratic.at(None), problem.penalty.to(torch.float64).scaled(unit)
        each = prices(penalty, weight)
        places, residual = torch.arange(len(weight), device=weight.device), quadratic.residual(weight)
        size = torch.where(quadratic.energy > 0, quadratic.energy, 1.0).sqrt()[:, None]
        cross, weight, residual = (tensor / size for tensor in (quadratic.cross, weight, residual))
        closed, ridge = each[0] == inf, each[1]
        strength, lower, upper = ((each[i] / size).masked_fill(closed, 0) for i in (0, 2, 3))
        energy = quadratic.energy / size[:, 0].square()
        rows = cls(places, size, cross, energy, strength, ridge, lower, upper, weight, residual, size)
        ratio = rows._ratios()
        level = ratio.masked_fill_(ratio == inf, 0).amax(1, keepdim=True).clamp_min_(1)
        return rows._replace(level=level)

    def chosen(self, which: Tensor) -> Self:
        return self if bool(which.all()) else type(self)(*(tensor[which] for tensor in self))

    def done(self, tolerance: float) -> Tensor:
        """Return the mask [m] of rows whose gap, by scaling the residual, is within the tolerance."""
        penalty = ElasticNet(self.strength, self.ridge, self.lower, self.upper)
        values = (self.energy - torch.linalg.vecdot(self.weight, self.cross + self.residual)).clamp_min(0) / 2
        slack, overlap = penalty.values(self.weight), torch.linalg.vecdot(self.residual, self.weight)
        best = torch.where(values > 0, 1 + overlap / (2 * values), 1.0).clamp_min(0)
        inside = penalty.project(self.residual)
        dual = torch.where((inside - self.residual).abs() < 10 * SLIGHT, inside, self.residual)
        largest, gaps = penalty.dual_scale(dual), torch.full_like(values, inf)
        for s in (torch.minimum(largest, best), largest.clamp_max(1)):  # with a ridge or bounds only 1 is tight
            rest = (slack + penalty.conjugate(s[:, None] * dual) - s * overlap).clamp_min(0)
            gaps = torch.minimum(gaps, (1 - s).square() * values + rest)
        return gaps <= tolerance * torch.maximum(values + slack, torch.finfo(values.dtype).eps * self.energy)

    def working_sets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next level [m 1], the size of each row's working set [m], and how much an entry belongs there."""
        level = (self.level / FALL).clamp_min(1)
        level = torch.where(level < 1.2, 1.0, level)
        ratio, inside = self._ratios(), self.weight != 0
        count, more = inside.sum(1), (ratio > level).sum(1)
        sizes = count + torch.minimum(more, count.clamp_min(FIRST))
        return level, sizes, ratio.masked_fill_(inside, inf)

    def _ratios(self) -> Tensor:
        """Return |K| / strength [m n] of entries that are zero and may leave it; zero elsewhere."""
        pull = self.residual.clamp(torch.where(self.lower < 0, -inf, 0.0), torch.where(self.upper > 0, inf, 0.0))
        free = self.strength < FREE * self.strength.amax(1, keepdim=True)
        ratio = (pull.abs() / self.strength).masked_fill_(free & (pull.abs() > SLIGHT), inf)
        return ratio.nan_to_num_(nan=0.0, posinf=inf).masked_fill_(self.weight != 0, 0)

    def on(self, gram: Tensor, chunk: Tensor, inside: Tensor, level: Tensor, tolerance: float) -> Tensor:
        """Return the answers [rows size] of the rows `chunk` on the working sets `inside`."""
        weight, residual, strength, ridge, lower, upper = (
            tensor[chunk].gather(1, inside)
            for tensor in (self.weight, self.residual, self.strength, self.ridge, self.lower, self.upper)
        )
        part = gram[inside[:, :, None], inside[:, None]]
        part.diagonal(dim1=1, dim2=2).add_(ridge)
        tolerances = torch.where(level[chunk] == 1, max(tolerance**0.5, 1e-8), 0.05) / 10
        return _on_set(part, weight, residual - ridge * weight, strength * level[chunk], lower, upper, tolerances)


def _alike(sizes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Split rows into chunks with working sets of nearly the same size; yield the size of the largest, and the rows."""
    order, ordered = sizes.argsort(descending=True), sizes.sort(descending=True).values.tolist()
    first = 0
    while first < len(ordered) and ordered[first]:
        size, last = ordered[first], first
        most = first + max(1, AT_ONCE // size**2)
        while last < len(ordered) and last < most and (ordered[last] * ALIKE >= size or size <= 2 * FIRST):
            last += 1
        yield size, order[first:last]
        first = last


def _on_set(
    gram: Tensor, weight: Tensor, residual: Tensor, strength: Tensor, lower: Tensor, upper: Tensor, tolerance: Tensor
) -> Tensor:
    """Return the answers [e k] of e problems with the Gram matrices [e k k], and the `residual` at `weight` [e k]."""
    answers, places = weight.clone(), torch.arange(len(weight), device=weight.device)
    for _ in range(NEWTON_STEPS):
        weight, residual = _newton_step(gram, weight, residual, strength, lower, upper)
        ahead = weight + residual
        ahead = (ahead - ahead.clamp(-strength, strength)).clamp(lower, upper)
        going = ((ahead - weight).abs() > tolerance * strength + SLIGHT).any(1)
        answers[places] = weight
        left = int(going.sum())
        if not left:
            break
        if left < 0.6 * len(going):  # the rest is copied
            places = places[going]
            gram, weight, residual, strength, lower, upper, tolerance = (
                each[going] for each in (gram, weight, residual, strength, lower, upper, tolerance)
            )
    return answers


def _newton_step(
    gram: Tensor, weight: Tensor, residual: Tensor, strength: Tensor, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Return weight and residual [e k] after a Newton step, cut where a weight changes its sign or leaves its bounds.

    Where halving the step does not make it go down, the next step is that of an active-set method.
    """
    sign = torch.where(weight != 0, weight.sign(), residual.sign())
    least, most = torch.where(sign > 0, 0.0, lower), torch.where(sign > 0, upper, 0.0)
    slope = residual - strength * sign  # the gain of a weight that moves as its sign says
    free = ((weight != 0) | (residual.abs() > strength)) & ~((weight >= upper) & (slope > 0))
    slope = slope.masked_fill(~free | ((weight <= lower) & (slope < 0)), 0)
    after, rest, todo = weight, residual, torch.ones_like(weight[:, :1], dtype=torch.bool)
    for step in _steps(gram, weight, slope, least, most):
        ahead = torch.where(todo, (weight + step).clamp(least, most), after)
        move = ahead - weight
        image = torch.bmm(gram, move[:, :, None])[:, :, 0]
        price = strength * (ahead.abs() - weight.abs())
        gain = torch.linalg.vecdot(move, residual - image / 2) - price.sum(1)
        slight = torch.linalg.vecdot(slope, move)
        good = gain >= 1e-4 * slight.abs() - EPSILON
        after, rest, todo = ahead, residual - image, todo & ~good[:, None]
        if not bool(todo.any()):
            break
    return after, rest


def _steps(gram: Tensor, weight: Tensor, slope: Tensor, least: Tensor, most: Tensor) -> Iterator[Tensor]:
    """Yield steps [e k] to try one after another, until all rows go down."""
    newton = _newton_direction(gram, slope)
    for halving in range(HALVINGS):
        yield newton / 2**halving
    inside = weight != 0  # the weights that are not zero have to be solved before another enters (Lawson and Hanson)
    largest = slope.abs().amax(1, keepdim=True)
    settled = slope.masked_fill(~inside, 0).abs().amax(1, keepdim=True) <= 1e-6 * largest
    newton = _newton_direction(gram, slope.masked_fill(~inside & ~(settled & (slope.abs() == largest)), 0))
    room = torch.where(newton > 0, most, least) - weight
    length = torch.where(newton != 0, room / newton, inf).amin(1, keepdim=True).clamp_max(1)
    jacobi = slope / gram.abs().sum(2)  # over the row sums it always goes down
    yield torch.where(length > 0, newton * length, jacobi)  # no room: a weight on a bound would leave it
    yield jacobi


def _newton_direction(gram: Tensor, slope: Tensor) -> Tensor:
    """Return slope H^-1 [e k] on the entries whose slope is not zero, or the slope where there is no factor."""
    keep = (slope != 0).to(gram)
    inner = gram * keep[:, :, None] * keep[:, None]
    inner.diagonal(dim1=1, dim2=2).add_(1 - keep + SHIFT)
    direction = torch.cholesky_solve(slope[:, :, None], torch.linalg.cholesky_ex(inner).L)[:, :, 0]
    return torch.where(direction.isfinite().all(1, keepdim=True), direction, slope)
