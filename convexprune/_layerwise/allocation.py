"""Spread zeros over operators, rows and columns by a rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from convexprune._layerwise.settings import LayerSettings
from convexprune.constraints import Constraint
from convexprune.core._allocation import (
    Curve,
    allocate,
    allocate_by_outliers,
    allocate_by_skewness,
    cheapest_points,
)
from convexprune.errors import CalibrationError, RecipeError, unknown

RULES = ("uniform", "columns", "rows", "curve", "half-curve", "measured", "owl", "skewness")
WEIGHED = RULES[1:6]  # those that need gradients
LOOKING = RULES[3:]  # those that look at the dense model
SURVEYED = RULES[3:6]  # those that prune for it
REACH, STEP = 0.2, 0.1  # of the curves: how far from the share asked for, and how densely
FINE = 20  # points of a curve between two that were surveyed, where any share can be had
LEAST = 0.1  # of a row's part in the loss, over the mean row's: what moves nothing on these tokens may on others


@dataclass(frozen=True)
class ModelAllocation:
    """The requested share of zeros by operator, "layer.operator"; empty if all operators have the same share."""

    shares: dict[str, float]
    cost: float | None = None  # the predicted loss, in nats per token, of a rule with curves
    gap: float | None = None  # bound on the possible decrease of the cost, by the curves
    # [m] by operator, in the competition for non-zeros
    row_weights: dict[str, list[float]] = field(default_factory=dict)
    # the loss's need of column blocks by operator, if the loss chooses columns
    columns: dict[str, list[float]] = field(default_factory=dict)

    def patterns(self, pattern: Constraint) -> dict[str, Constraint]:
        return {name: pattern.with_share(share) for name, share in self.shares.items()}

    def apply_to(self, settings: LayerSettings, pattern: Constraint) -> LayerSettings:
        """Return the settings of a run with the global `pattern` and this allocation."""
        rows, columns = (
            {name: torch.tensor(each) for name, each in weights.items()} for weights in (self.row_weights, self.columns)
        )
        patterns = {**settings.patterns, **self.patterns(pattern)}
        return replace(settings, patterns=patterns, row_weights=rows, columns=columns)


@dataclass(frozen=True, eq=False)
class Unit:
    """An operator, "layer.operator", of `size` weights, and the costs of pruning, in nats per token."""

    name: str
    size: int
    costs: Mapping[Constraint, float]  # by surveyed pattern that fits the operator
    outliers: float  # the share of outlying scores |W_ij| |x_j| (Wanda's) in the whole layer
    skewness: float  # of |W_ij| in the whole layer


def candidates(pattern: Constraint) -> list[Constraint]:
    """Return the possible patterns of an operator, the sparsest last: sparsities around one, or every N of the M."""
    return pattern.ladder(REACH, STEP)


def further(pattern: Constraint) -> Constraint:
    """Return the next sparser candidate, or the next denser one of the sparsest."""
    ladder = candidates(pattern)
    number = ladder.index(pattern)
    return ladder[number + 1 if number + 1 < len(ladder) else number - 1]


def measured(
    units: Sequence[Unit],
    steps: tuple[Constraint, Constraint],
    added: Mapping[str, float],
    groups: Mapping[str, Sequence[str]],
) -> list[Unit]:
    """Return units whose costs follow the divergence `added` by `steps` from a pattern to another, by group.

    A unit's costs are multiplied by the root of measured over predicted of each of its `groups`, relative to the whole
    model: half of the way, because the divergence is that of few windows (lab/tried.md).
    """
    both = {unit.name: [unit.costs[pattern] for pattern in steps if pattern in unit.costs] for unit in units}
    predicted = {name: costs[1] - costs[0] if len(costs) > 1 else 0.0 for name, costs in both.items()}
    factors = dict.fromkeys(predicted, 1.0)
    for names in zip(*(groups[name] for name in predicted), strict=True) if any(predicted.values()) else ():
        sums = dict.fromkeys(names, 0.0)
        for name, cost in zip(names, predicted.values(), strict=True):
            sums[name] += cost
        scale = sum(added[name] for name in sums) / sum(sums.values())
        if not scale > 0:
            raise CalibrationError(
                f"Allocation 'measured': steps that should cost {sum(sums.values()):.2e} nats together add "
                f"{sum(added[name] for name in sums):.2e} to the divergence, which says nothing. Calibrate on more, or "
                "take 'curve'."
            )
        for unit, name in zip(predicted, names, strict=True):
            ratio = added[name] / (scale * sums[name]) if sums[name] else 1.0
            factors[unit] *= min(max(ratio, LEAST), 1 / LEAST) ** 0.5
    return [replace(u, costs={p: factors[u.name] * cost for p, cost in u.costs.items()}) for u in units]


def row_weights(fisher: Tensor) -> Tensor:
    """Return the weights [m] of rows in their competition: sqrt(f_i / mean f), with f_i = mean (d loss / d y_i)^2.

    With f_i the error of an operator would be `survey`'s estimate of the loss. The root goes half of the way from
    equal rows, for the reasons of "half-curve": measured, the root is better (lab/tried.md).
    """
    middle = fisher.mean()
    return (fisher / middle).clamp_min(LEAST).sqrt() if middle > 0 else torch.ones_like(fisher)


def check_rule(rule: str, pattern: Constraint) -> None:
    """Refuse, before any work, a rule that does not exist, or that the pattern does not allow."""
    if rule not in RULES:
        raise RecipeError(unknown("allocation", rule, RULES))
    if rule == "columns" and not pattern.by_column:
        raise RecipeError(
            f"Allocation 'columns' chooses whole columns by how much they move the loss, and pattern {pattern} has "
            "none to choose. Accepted: the patterns 'channels', 'heads' and 'columns'."
        )
    ladder = candidates(pattern) if rule == "measured" else []
    spreads_zeros = pattern.continuous and any(each.sparsity != pattern.sparsity for each in ladder)
    if rule == "measured" and (spreads_zeros or len(ladder) < 2):
        raise RecipeError(
            f"Allocation 'measured' chooses an N of N:M, bits or types for every operator, and {pattern} has none. "
            "Accepted: patterns like 4:8 and 2:4, bits, and target; else take 'half-curve' or 'uniform'."
        )
    if rule not in ("uniform", "columns", "curve", "measured") and not pattern.continuous:
        raise RecipeError(
            f"Allocation {rule!r} needs pattern unstructured, not {pattern}: for N:M there are 'uniform', 'curve' and "
            "'measured'."
        )
    if rule in LOOKING and pattern.removes:
        raise RecipeError(
            f"Allocation {rule!r} gives each operator a share of its own, and with pattern {pattern} all layers keep "
            "the same width. Accepted: 'uniform', 'rows', and 'columns' for channels and heads."
        )
    if rule in ("owl", "skewness") and pattern.share != pattern.sparsity:
        raise RecipeError(f"Allocation {rule!r} spreads zeros, and {pattern} has bits to spread: take 'curve'.")
    if rule == "rows" and pattern.by_row:
        raise RecipeError(
            "Allocation 'rows' lets the rows of a matrix compete for its non-zeros; with quota='row' each has its own. "
            "Leave one of them out."
        )


def allocate_by_rule(
    units: Sequence[Unit], rule: str, pattern: Constraint, fisher: Mapping[str, Tensor] | None = None
) -> ModelAllocation:
    """Allocate the zeros of `pattern` to operators and their rows, by a rule.

    "rows" requests an equal share of every operator, whose rows compete by `row_weights` of `fisher` (the f_i [m] of
    `survey`); rows compete in the same way under the next two rules. "curve" minimises the surveyed costs
    (`core._allocation`); "half-curve" goes half of the way from uniform shares, because the costs are of a single
    text and count the errors of operators as independent (lab/benchmarks.md); "measured" is "curve" for units that are
    `measured`. "owl" (arXiv 2310.05175) gives a layer with more outlying scores less sparsity, "skewness" a layer with
    more skewed weights: AutoPrune's allocation (arXiv 2511.15390) as far as it could be reconstructed.
    """
    check_rule(rule, pattern)
    if rule == "uniform":
        return ModelAllocation({})
    weighed = fisher if fisher is not None and rule in WEIGHED and not pattern.by_row else {}
    rows = {name: [float(f"{w:.3g}") for w in row_weights(f).tolist()] for name, f in weighed.items()}  # for a file
    if rule == "rows":
        return ModelAllocation({}, row_weights=rows)
    cost = gap = None
    if rule in SURVEYED:
        fitting = [[p for p in candidates(pattern) if p in unit.costs] for unit in units]
        curves = [
            Curve(unit.size, tuple(p.share for p in own), tuple(unit.costs[p] for p in own))
            for unit, own in zip(units, fitting, strict=True)
        ]
        if pattern.sparsity != pattern.share:  # an error that is four times as large for each bit that is saved
            curves = [curve.refined(FINE) for curve in curves]
        found = allocate(curves, pattern.share)
        if pattern.continuous:
            step = 0.5 if rule == "half-curve" else 1.0
            shares = [pattern.share + step * (share - pattern.share) for share in found.sparsities]
        else:
            shares = cheapest_points(curves, pattern.share)
        cost = sum(curve.envelope.cost(share) for curve, share in zip(curves, shares, strict=True))
        gap = max(0.0, cost - (found.cost - found.gap))
    else:
        sizes = [u.size for u in units]
        if rule == "owl":
            shares = allocate_by_outliers([u.outliers for u in units], sizes, pattern.sparsity)
        else:
            shares = allocate_by_skewness([u.skewness for u in units], sizes, pattern.sparsity)
    each = {unit.name: round(share, 6) for unit, share in zip(units, shares, strict=True)}
    return ModelAllocation(each, cost, gap, rows)
