"""The interface of pruners: a `LayerProblem` in, a `LayerEdit` out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor

from convexprune._setting_types import check_settings
from convexprune.constraints import Constraint, sizes
from convexprune.core import Moments, Quadratic
from convexprune.errors import PatternError
from convexprune.pruners._cost import Cost
from convexprune.solvers import Solution


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Fit `weight` [m n] into `pattern` with the least change of the outputs, on inputs described by `moments`.

    `correction` in [0, 1] is the share of earlier operators' errors that the operator corrects
    (`Moments.reconstruction`); `folds` are the moments of two disjoint halves of the tokens. `importance` [m n] is the
    loss's need of a column, alike in all rows of an operator, if columns are chosen by the loss.
    """

    weight: Tensor
    moments: Moments
    pattern: Constraint
    correction: float = 1.0
    folds: tuple[Moments, ...] = ()
    importance: Tensor | None = None

    @cached_property
    def gram(self) -> Tensor:
        """H [n n]; problems with equal inputs share the matrix."""
        return self.moments.gram

    @cached_property
    def quadratic(self) -> Quadratic:
        """The reconstruction error without damping: the reported error, whatever the pruner minimised."""
        return self.moments.reconstruction(self.weight, self.correction, gram=self.gram)

    @cached_property
    def energy(self) -> Tensor:
        """mean |W x|^2 by row [m]."""
        return self.moments.energy(self.weight, self.gram)

    def squared_error(self, weight: Tensor) -> Tensor:
        """Return mean |V x* - target|^2 by row [m] of a `weight` V; divided by `energy`, the relative error."""
        return 2 * self.quadratic.values(weight)

    @cached_property
    def scale(self) -> Tensor:
        """sqrt(H_jj) [n]; |W| * scale are Wanda's scores."""
        return self.quadratic.gram.diagonal().sqrt()

    @cached_property
    def dead(self) -> Tensor:
        """Mask [n] of inputs that are always zero: their weights change no output."""
        return self.moments.sum.diagonal() == 0

    @cached_property
    def typical_energy(self) -> float:
        """The geometric mean of the energies H_jj of live inputs: a massive activation hardly moves that."""
        energies = self.quadratic.gram.diagonal()
        largest = energies.max()
        ratios = (energies[energies > 0] / largest).log().mean().exp()  # the same bits in units of any power of two
        return float(ratios * largest) if largest > 0 else 0.0

    def operators(self) -> list["LayerProblem"]:
        """Split the stack into a problem per operator."""
        return [self.rows(rows, own) for rows, own in self.pattern.parts(len(self.weight))]

    def scaled(self, factors: Tensor | None) -> "LayerProblem":
        """Return the problem in which errors of outputs count by the square of their `factors` [m]; None: alike."""
        # Rows compete differently under a quota of the whole matrix. The best weights on a support stay the same.
        if factors is None:
            return self
        weight = self.weight * factors.to(self.weight)[:, None]
        moments, folds = self.moments.scaled(factors), tuple(fold.scaled(factors) for fold in self.folds)
        return self._on_the_same_inputs(replace(self, weight=weight, moments=moments, folds=folds))

    def rows(self, chosen: Tensor | slice, pattern: Constraint) -> "LayerProblem":
        """Return the problem of selected rows.

        Args:
            chosen: numbers [k], a mask [m] or a slice.
            pattern: of these rows.

        Returns:
            The problem.
        """
        importance = None if self.importance is None else self.importance[chosen]
        own = replace(self, pattern=pattern, moments=self.moments.rows(chosen), importance=importance)
        return self._on_the_same_inputs(replace(own, weight=self.weight[chosen]))

    def _on_the_same_inputs(self, other: "LayerProblem") -> "LayerProblem":
        """Share the Gram matrix with a problem on the same inputs."""
        vars(other)["gram"] = self.gram
        return other


@dataclass(frozen=True)
class Damping:
    """A pull towards the dense weight,  1/2 sum_i (V - W)_i (E (ridge I + saturating P) E + prior I) (V - W)_i'.

    P = I - k (C + k I)^-1, with the correlations C = S^-1 H S^-1, S = sqrt(diag H) and k = `EIGENVALUE_KNEE`, is small
    in directions where the sample has little energy. E = S^(1 - levelling) h^(levelling / 2) has the energies of
    inputs nearer to a typical one, h. The prior is on energies: it pulls at a rare input as if the input had that much
    more energy.

    Args:
        ridge: the pull in all directions.
        saturating: the pull in directions of much energy, beside the ridge.
        prior: in units of H.
        levelling: how far the pull levels the energies of inputs, in [0, 1]: not at all, or fully.
    """

    ridge: float
    saturating: float = 0.0
    prior: float = 0.0
    levelling: float = 0.0

    @property
    def strength(self) -> float:
        """The pull in directions of much energy, without the prior."""
        return self.ridge + self.saturating


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """The answer of a pruner to a `LayerProblem`.

    Args:
        weight: V [m n], in the pattern.
        mask: kept entries [m n]; after quantization the non-zero entries.
        solutions: every convex solve, the last solve at the end.
        damping: damping of the problem; None without damping.
        facts: further numbers for the report, by name.
        other_products: matrix products [m n] x [n n] outside the solves.
        blocks: for each operator its bytes [m ...] in a file of block grids, where it is on one; empty if none is.
    """

    weight: Tensor
    mask: Tensor
    solutions: tuple[Solution, ...] = ()
    damping: Damping | None = None
    facts: dict[str, float] = field(default_factory=dict)
    other_products: int = 0
    blocks: tuple[Tensor | None, ...] = ()

    @property
    def products(self) -> int:
        """All matrix products [m n] x [n n], the unit of cost."""
        return self.other_products + sum(solution.products for solution in self.solutions)


def unchanged(problem: LayerProblem) -> LayerEdit:
    return LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))


def projected(problem: LayerProblem, metric: Tensor | None = None) -> LayerEdit:
    """Return the dense weight projected on the pattern, in a metric [n]."""
    mask = problem.pattern.mask(sizes(problem.weight, metric))
    return LayerEdit(problem.weight * mask, mask)


Score = Literal["divergence", "influence", "output", "reap"]
"""What parts of a model that are removed whole are chosen by. Of decoder layers: the "divergence" of the predictions
without a layer from the dense ones, on held-out text; or the "influence", how far a layer turns the hidden states. Of
experts: the error of the mixture's "output" without them; or "reap", the mean size of what one adds if it is chosen."""
WHOLE = {"layers": ("decoder layers", "shortgpt"), "experts": ("experts", "reap")}
"""The parts of a model that are removed whole, in words, and the baseline that chooses them."""
Prune = TypeVar("Prune", bound=Callable[..., LayerEdit])


def filled(problem: LayerProblem) -> LayerProblem:
    """Return the problem in which dead inputs have a mean input's energy, and weights of zero (SparseGPT)."""
    if not bool(problem.dead.any()):
        return problem
    moments = problem.moments.with_dead_inputs_filled(problem.weight)
    return replace(problem, weight=problem.weight.masked_fill(problem.dead, 0), moments=moments)


def with_dead_weights(problem: LayerProblem, found: LayerEdit) -> LayerEdit:
    """Give kept weights on dead inputs their dense values in an answer to the `filled` problem."""
    return replace(found, weight=torch.where(problem.dead, problem.weight * found.mask, found.weight))


def dead_inputs_first(prune: Prune) -> Prune:
    """Make a method prune the weights on inputs that are always zero (H_jj = 0) first.

    The method sees the `filled` problem. If the pattern keeps such a weight, because it asks for fewer zeros, the
    weight keeps its dense value.
    """

    @wraps(prune)
    @torch.no_grad()
    def pruned(self: Any, problem: LayerProblem) -> LayerEdit:
        alive = filled(problem)
        found = prune(self, alive)
        return found if alive is problem else with_dead_weights(problem, found)

    return cast(Prune, pruned)


class AbstractPruner(ABC):
    """Settings of a pruner, a dataclass; a setting of a wrong type, or out of range, is a `RecipeError`."""

    columns_only: ClassVar[bool] = False
    """True if the pruner can only remove whole columns."""
    one_by_one: ClassVar[bool] = False
    """True if the pruner decides about column after column, and cannot remove blocks of columns."""
    whole_only: ClassVar[str | None] = None
    """The parts of a model, "layers" or "experts", that the pruner can only remove whole; None: it can do more."""
    side_by_side: ClassVar[bool] = False
    """True if `prune_all` is more than one after another."""
    scores: ClassVar[Mapping[str, Score]] = {}
    """What whole "layers" and "experts" are chosen by where they are removed; it cannot choose others."""
    cost: ClassVar[Cost] = Cost()
    """The needs of the method, of memory and time."""

    def __post_init__(self) -> None:
        check_settings(self)

    def require(self, pattern: Constraint) -> None:
        """Refuse, before any work, a pattern that the method cannot take.

        Args:
            pattern: the pattern.

        Raises:
            PatternError: the method cannot take the pattern.
        """
        if self.columns_only and not pattern.by_column:
            raise PatternError(
                f"{type(self).__name__} removes whole columns, and pattern {pattern} is no choice of these. Take "
                "pattern 'channels' or 'columns', or another method."
            )
        if self.one_by_one and pattern.by_column and pattern.block > 1:
            raise PatternError(
                f"{type(self).__name__} decides about columns one after another, and pattern {pattern} removes blocks "
                "of them. Take method 'convex', 'osscar' or 'wanda-sp'."
            )
        own, asked = self.whole_only, pattern.removes
        if own is not None and asked != own:
            raise PatternError(
                f"{type(self).__name__} removes {WHOLE[own][0]}, and pattern {pattern} does not. Take pattern "
                f"{own!r}, or another method."
            )
        if asked in WHOLE and asked not in self.scores:
            what, baseline = WHOLE[asked]
            raise PatternError(
                f"{type(self).__name__} chooses entries of a weight, and pattern {pattern} removes whole {what}. "
                f"Take method 'convex' or {baseline!r}, or another pattern."
            )

    @abstractmethod
    def prune(self, problem: LayerProblem) -> LayerEdit:
        """Return a weight in the pattern of a `problem`."""

    def prune_all(self, problems: Sequence[LayerProblem]) -> list[LayerEdit]:
        """Prune `problems` of equal shape, in turn or side by side, with the answers of `prune` up to rounding."""
        return [self.prune(problem) for problem in problems]
