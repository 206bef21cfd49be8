"""What pruning each part of a model to each pattern would cost: one pass over the dense model, which stays as it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.allocation import Curve, allocate, spread
from convexprune.errors import RecipeError, unknown
from convexprune.model import AbstractModel, DecoderLayer
from convexprune.pattern import SemiStructured, Stacked, Unstructured
from convexprune.pipeline.lacking import stack_of
from convexprune.pipeline.layer import HiddenStates, LayerSettings, stage_folds
from convexprune.pipeline.passes import Calls, Observed, Recorded, observe
from convexprune.pipeline.tensors import Batches
from convexprune.pruners import AbstractPruner, PruningProblem, SparseGPT

Pattern = Unstructured | SemiStructured
RULES = ("uniform", "curve", "half-curve", "owl", "skewness")
SURVEYED = RULES[1:3]  # those that prune for it
REACH, STEP = 0.2, 0.1  # of the curves: how far from the share asked for, and how densely
OUTLIER = 5  # times the mean score; OWL's M


@dataclass(frozen=True)
class Allotment:
    """The share of zeros that each operator, "layer.operator", is asked for; none where all have the same.

    Of a rule that has curves, `cost` is the loss that they predict, in nats a token, and `gap` how much less any other
    allotment could cost at most, by the same curves.
    """

    shares: dict[str, float]
    cost: float | None = None
    gap: float | None = None

    def patterns(self, pattern: Pattern) -> dict[str, Pattern]:
        """The operators' patterns, each of the kind of `pattern`."""
        return {name: with_share(pattern, share) for name, share in self.shares.items()}


@dataclass(frozen=True, eq=False)
class Unit:
    """An operator, "layer.operator", of `size` weights; `costs` are those of pruning it to each pattern surveyed.

    `outliers` and `skewness` are those of Wanda's scores |W_ij| |x_j| in the whole decoder layer.
    """

    name: str
    size: int
    costs: Mapping[Pattern, float]
    outliers: float
    skewness: float


def candidates(pattern: Pattern) -> list[Pattern]:
    """The patterns that an operator may get where `pattern` is asked for on the whole, the sparsest last.

    For a share of zeros, shares around it; for N:M, every N of that M.
    """
    if isinstance(pattern, SemiStructured):
        return [SemiStructured(kept, pattern.group) for kept in range(pattern.group - 1, 0, -1)]
    steps = round(REACH / STEP)
    shares = (round(pattern.sparsity + step * STEP, 6) for step in range(-steps, steps + 1))
    return [Unstructured(share, pattern.quota) for share in shares if 0 <= share < 1]


@torch.no_grad()
def survey(
    model: AbstractModel,
    hidden: Sequence[Tensor],
    held_out: int,
    calls: Callable[[int], Calls],
    patterns: Sequence[Pattern],
    fisher: Mapping[str, Tensor],
    pruner: AbstractPruner | None = None,
    record: Callable[[], Recorded] = list,
) -> list[Unit]:
    """Prune every operator of the dense model to every pattern, write nothing, and report the costs.

    One decoder layer at a time is in memory, and what enters and leaves it where `record` keeps it.

    A cost is 1/2 sum_i f_i mean (delta y_i)^2: `fisher` holds f_i = mean (d loss / d y_i)^2 of each operator's outputs
    [m], so this is the Gauss-Newton estimate of the loss with a diagonal metric, in nats a token, and comparable across
    layers. It is taken on the last `held_out` of the batches `hidden`, or on all if none is held out. `pruner` gives
    the weights, SparseGPT unless given: a curve's shape is what matters, and it is quick. `hidden` is used up if it is
    on disk.
    """
    pruner, units = pruner or SparseGPT(), []
    for number, layer in enumerate(model.layers):
        states = HiddenStates(hidden, hidden, held_out)
        with model.resident(layer):
            observed = observe(layer, calls(number), hidden, record)
            units += _units(layer, calls(number), states, observed, patterns, fisher, pruner)
        for used in (hidden, *observed.inputs.values()):
            if isinstance(used, Batches):
                used.path.unlink()
        hidden = observed.outputs
    return units


def check_rule(rule: str, pattern: Pattern) -> None:
    """Refuse, before any work, a rule that there is not, or that the pattern does not allow.

    Raises:
        RecipeError: it is such a rule.
    """
    if rule not in RULES:
        raise RecipeError(unknown("allocation", rule, RULES))
    if rule not in ("uniform", "curve") and isinstance(pattern, SemiStructured):
        raise RecipeError(
            f"Allocation {rule!r} needs pattern unstructured, not {pattern}: for N:M there are 'uniform' and 'curve'."
        )


def allot(units: Sequence[Unit], rule: str, pattern: Pattern) -> Allotment:
    """The zeros of `pattern` on the whole, spread over the operators by a rule.

    "curve" minimises the surveyed costs (`convexprune.allocation.allocate`); "half-curve" goes half of the way there
    from the uniform shares, as the costs are of one text and of errors that do not know of each other
    (docs/benchmarks.md). "owl" (arXiv 2310.05175) and "skewness" give a layer whose scores have more outliers, or are
    more skewed, less sparsity (`allocation.spread`); the second is the idea of AutoPrune (arXiv 2511.15390) in OWL's
    form, not its formula.

    Raises:
        RecipeError: see `check_rule`.
        PatternError: the share of zeros cannot be allocated so.
    """
    check_rule(rule, pattern)
    if rule == "uniform":
        return Allotment({})
    cost = gap = None
    if rule in SURVEYED:
        choice = candidates(pattern)
        curves = [Curve(u.size, tuple(p.sparsity for p in choice), tuple(u.costs[p] for p in choice)) for u in units]
        found = allocate(curves, pattern.sparsity, whole=isinstance(pattern, SemiStructured))
        step = 1.0 if rule == "curve" else 0.5
        shares = [pattern.sparsity + step * (share - pattern.sparsity) for share in found.sparsities]
        cost = sum(curve.envelope.cost(share) for curve, share in zip(curves, shares, strict=True))
        gap = max(0.0, cost - (found.cost - found.gap))
    else:
        statistics = [u.outliers if rule == "owl" else u.skewness for u in units]
        shares = spread(statistics, [u.size for u in units], pattern.sparsity)
    each = {unit.name: round(share, 6) for unit, share in zip(units, shares, strict=True)}
    return Allotment(each, cost, gap)


def _units(
    layer: DecoderLayer,
    calls: Calls,
    hidden: HiddenStates,
    observed: Observed,
    patterns: Sequence[Pattern],
    fisher: Mapping[str, Tensor],
    pruner: AbstractPruner,
) -> list[Unit]:
    settings = LayerSettings(pruner, Unstructured(0.0), correction=0)
    found = dict[str, tuple[int, dict[Pattern, float]]]()
    scores: list[Tensor] = []
    for number in range(len(layer.stages)):
        for part in stage_folds(layer, number, calls, hidden, observed, settings, dict(observed.inputs)):
            for group, folds in part.items():
                heights = tuple(operator.shape[0] for operator in group.operators)
                weight = stack_of(group)
                judge = folds.held_out if folds.held_out.tokens else folds.total
                names = [f"{layer.name}.{operator.name}" for operator in group.operators]
                costs = {name: dict[Pattern, float]() for name in names}
                for pattern in patterns:
                    stack = Stacked.alike(pattern, heights)
                    pruned = pruner.prune(PruningProblem(weight, folds.total, stack, 0.0)).weight
                    errors = PruningProblem(weight, judge, stack, 0.0).squared_error(pruned).double()
                    for name, error in zip(names, errors.split(heights), strict=True):
                        costs[name][pattern] = float(error @ fisher[name].to(error)) / 2
                sizes = [height * weight.shape[1] for height in heights]
                found |= {name: (size, costs[name]) for name, size in zip(names, sizes, strict=True)}
                scores.append((weight.abs() * folds.total.gram.diagonal().sqrt()).flatten().cpu())
    outliers, skewness = _shape(torch.cat(scores)) if scores else (0.0, 0.0)
    return [Unit(name, size, costs, outliers, skewness) for name, (size, costs) in found.items()]


def _shape(scores: Tensor) -> tuple[float, float]:
    """The share of scores above `OUTLIER` times their mean, and their skewness."""
    middle = scores.mean()
    centred = (scores - middle).double()
    skewness = centred.pow(3).mean() / centred.square().mean().pow(1.5)
    return float((scores > OUTLIER * middle).float().mean()), float(skewness)


def with_share(pattern: Pattern, share: float) -> Pattern:
    """The same kind of pattern with another share of zeros."""
    if isinstance(pattern, SemiStructured):
        return SemiStructured(round((1 - share) * pattern.group), pattern.group)
    return Unstructured(share, pattern.quota)
