"""The layer problems of a model: each operator's dense and pruned weight, and its moments in float64."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.constraints import Constraint
from convexprune.model import AbstractModel, DecoderLayer
from convexprune.moments import Moments
from convexprune.pipeline import (
    HiddenStates,
    LayerSettings,
    RecordedCalls,
    observe,
    prune_observed,
    stage_inputs,
)
from convexprune.pipeline.bounding import drawn_rows
from convexprune.pipeline.lacking import Lacking, height, width
from convexprune.pipeline.layer import Tell
from convexprune.pipeline.passes import Calls, closing_inputs
from convexprune.pruners import PruningProblem
from convexprune.pruners.damped import Damping
from convexprune.report import OperatorReport


@dataclass(frozen=True, eq=False)
class OperatorProblem:
    """One operator [m n]: its `dense` weight, the `pruned` one that was achieved, and the `moments` of its problem.

    `damping` is what its pruner was damped by.
    """

    name: str
    dense: Tensor
    pruned: Tensor
    moments: Moments
    pattern: Constraint
    correction: float
    damping: Damping

    def rows(self, count: int | None, generator: torch.Generator) -> tuple[PruningProblem, Tensor]:
        """The pruning problem of `count` rows drawn at random (None: all), and the pruned weight of these rows."""
        chosen = drawn_rows(len(self.dense), count, generator)
        dense = self.dense[chosen].double()
        moments = self.moments.rows(chosen)
        return PruningProblem(dense, moments, self.pattern, self.correction), self.pruned[chosen].double()


@torch.no_grad()
def operator_problems(
    model: AbstractModel,
    tokens: Tensor,
    settings: LayerSettings,
    names: Collection[str],
    pruned: AbstractModel | None = None,
    batch_size: int = 1,
    reports: Iterable[OperatorReport] = (),
) -> Iterator[OperatorProblem]:
    """The problems of the operators `names` of the dense `model` on `tokens` [samples length], in order of execution.

    x is what an operator sees in the dense layer, x* what it sees in the layer pruned: that of the model `pruned`, or a
    copy that is pruned here as `settings` say; of a dense prefix only the layers that hold one of `names`. The model
    itself is not changed. An expert to which no token is sent is left out. `reports` are those of the run that wrote
    `pruned`.
    """
    batches = list(tokens.split(batch_size))
    calls = RecordedCalls(model, batches)
    dense = fed = [model.first_inputs(batch) for batch in batches]
    left = set(names)
    damping = {report.name: Damping.of(report.facts) for report in reports}

    def tell(report: OperatorReport) -> None:
        damping[report.name] = Damping.of(report.facts)

    for number, layer in enumerate(model.layers):
        of = calls.of(number)
        wanted = left & {f"{layer.name}.{operator.name}" for operator in layer.operators}
        sparse = layer
        if wanted or settings.prefix == "pruned":
            sparse = pruned.layers[number] if pruned else _pruned(layer, of, HiddenStates(dense, fed), settings, tell)
        yield from _watch(layer, sparse, wanted, of, HiddenStates(dense, fed), settings, damping)
        left -= wanted
        if not left:
            return
        fed = [of(batch)(sparse.module, batch) for batch in fed] if settings.prefix == "pruned" else None
        dense = [of(batch)(layer.module, batch) for batch in dense]
        fed = dense if fed is None else fed


def _pruned(
    layer: DecoderLayer, calls: Calls, hidden: HiddenStates, settings: LayerSettings, tell: Tell
) -> DecoderLayer:
    copy = deepcopy(layer)
    prune_observed(copy, calls, hidden, observe(copy, calls, hidden.dense, correct=(settings.correct,)), settings, tell)
    return copy


def _watch(
    dense: DecoderLayer,
    sparse: DecoderLayer,
    wanted: Collection[str],
    calls: Calls,
    hidden: HiddenStates,
    settings: LayerSettings,
    damping: Mapping[str, Damping],
) -> Iterator[OperatorProblem]:
    pairs = [
        (one, other)
        for one, other in zip(dense.groups, sparse.groups, strict=True)
        if any(f"{dense.name}.{operator.name}" in wanted for operator in one.operators)
    ]
    if not pairs:
        return
    observed = observe(dense, calls, hidden.dense, correct=(settings.correct,))
    same = dense.stages[0] if settings.prefix == "dense" else ()
    wanting = [one for one, _ in pairs if one.paired and one not in same and settings.correction > 0]
    lacking = Lacking(wanting, observed, settings.correct)
    moments = [
        Moments(width(one), torch.float64, outputs=height(one) if lacking.of_outputs(one) else None) for one, _ in pairs
    ]
    for i, given in enumerate(hidden.fed):
        seen = stage_inputs(sparse, [other for _, other in pairs], calls(given), given)
        for (one, other), total in zip(pairs, moments, strict=True):
            if other not in seen:
                continue
            x, output = seen[other].cpu(), None
            if lacking.closes([one]):
                pruned = closing_inputs(sparse, other, calls(given), given)
                output = pruned._replace(own=one.tap.module(seen[other])).output
            total.add(x)
            d = lacking.of(one, i, seen[other], output)
            if d is not None:
                total.add_errors(x.flatten(0, -2), d.flatten(0, -2).cpu())
    for (one, other), total in zip(pairs, moments, strict=True):
        rows = torch.arange(height(one)).split([w.shape[0] for w in one.operators])
        for w, v, own in zip(one.operators, other.operators, rows, strict=True):
            name = f"{dense.name}.{w.name}"
            if name in wanted and total.tokens:
                weights = w.read().cpu(), v.read().cpu()
                asked = settings.pattern_of(name), settings.correction, damping.get(name, Damping(0.0))
                yield OperatorProblem(name, *weights, total.rows(own), *asked)
