"""The layer problems of a model: each operator's dense and pruned weight, and its moments in float64."""

from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convexprune.model import AbstractModel, Call, DecoderLayer
from convexprune.moments import Moments
from convexprune.pattern import AbstractPattern
from convexprune.pipeline import LayerSettings, prune_layer
from convexprune.pruners import PruningProblem


@dataclass(frozen=True, eq=False)
class OperatorProblem:
    """One operator [m n]: its `dense` weight, the `pruned` one that was achieved, and what its inputs were."""

    name: str
    dense: Tensor
    pruned: Tensor
    moments: Moments
    pattern: AbstractPattern
    correction: float

    def rows(self, count: int | None, generator: torch.Generator) -> tuple[PruningProblem, Tensor]:
        """The pruning problem of `count` rows drawn at random (None: all), and the pruned weight of these rows."""
        m = len(self.dense)
        chosen = torch.arange(m) if count is None or count >= m else torch.randperm(m, generator=generator)[:count]
        dense = self.dense[chosen].double()
        return PruningProblem(dense, self.moments, self.pattern, self.correction), self.pruned[chosen].double()


@torch.no_grad()
def operator_problems(
    model: AbstractModel,
    tokens: Tensor,
    settings: LayerSettings,
    names: Collection[str],
    pruned: AbstractModel | None = None,
    batch_size: int = 1,
) -> Iterator[OperatorProblem]:
    """The problems of the operators `names` of the dense `model` on `tokens` [samples length], in order of execution.

    x is what an operator sees in the dense layer, x* what it sees in the layer pruned: that of the model `pruned`, or a
    copy that is pruned here as `settings` say (only the layers that hold one of `names`). The model itself is not
    changed.
    """
    batches = list(tokens.split(batch_size))
    recorded = {len(b): model.calls(b) for b in {len(b): b for b in batches}.values()}
    hidden = [model.first_inputs(batch) for batch in batches]
    left = set(names)
    for number, layer in enumerate(model.layers):

        def calls(batch: Tensor, number: int = number) -> Call:
            return recorded[len(batch)][number]

        wanted = [name for stage in layer.stages for name in stage if f"{layer.name}.{name}" in left]
        if wanted:
            if pruned is None:
                sparse = replace(layer, module=deepcopy(layer.module))
                prune_layer(sparse, calls, hidden, settings, lambda _: None)
            else:
                sparse = pruned.layers[number]
            yield from _watch(layer, sparse, wanted, calls, hidden, settings)
        left -= {f"{layer.name}.{name}" for name in wanted}
        if not left:
            return
        hidden = [calls(batch)(layer.module, batch) for batch in hidden]


def _watch(
    dense: DecoderLayer,
    sparse: DecoderLayer,
    names: Sequence[str],
    calls: Callable[[Tensor], Call],
    hidden: Sequence[Tensor],
    settings: LayerSettings,
) -> Iterator[OperatorProblem]:
    stages = [stage for stage in dense.stages if set(stage) & set(names)]
    moments = {stage: Moments(dense.operator(stage[0]).weight.shape[1], torch.float64) for stage in stages}
    for batch in hidden:
        x, seen = (_inputs(layer, [s[0] for s in stages], calls(batch), batch) for layer in (dense, sparse))
        for stage in stages:
            corrects = stage != dense.stages[0] and settings.correction > 0
            moments[stage].add(seen[stage[0]].cpu(), x[stage[0]].cpu() if corrects else None)
    for stage in stages:
        for name in (n for n in stage if n in names):
            w, v = (layer.operator(name).weight.detach().cpu() for layer in (dense, sparse))
            yield OperatorProblem(f"{dense.name}.{name}", w, v, moments[stage], settings.pattern, settings.correction)


def _inputs(layer: DecoderLayer, names: Sequence[str], call: Call, batch: Tensor) -> dict[str, Tensor]:
    """What each operator of a layer sees [tokens n]."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].flatten(0, -2)

        return hook

    hooks = [layer.operator(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        call(layer.module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
