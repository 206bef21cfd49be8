"""What every run is made of: a walk whose step prunes one decoder layer, from files to files, and again if need be."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune._layerwise.model import AbstractModel
from convexprune._layerwise.processes import ALONE, ProcessGroup, SamePruned, SameQuantized
from convexprune._layerwise.settings import HiddenStates, LayerSettings
from convexprune._layerwise.steps.stages import prune_observed
from convexprune._layerwise.store import AbstractStore
from convexprune._layerwise.walk import LayerContext, LayerWalk
from convexprune.report import OnOperator, OperatorReport


@dataclass(frozen=True, eq=False)
class Work:
    """What all layers of a run are pruned on: windows [samples length] to fit and to judge by, how, and by whom.

    Args:
        tokens: windows to fit on [samples length].
        held_out: windows to judge by [samples length].
        process_group: the ranks that prune each layer together.
    """

    tokens: Tensor
    held_out: Tensor
    batch_size: int
    settings: LayerSettings
    process_group: ProcessGroup = ALONE

    def of_rank(self, ranks: ProcessGroup) -> "Work":
        """The part of one rank: a share of the batches, and all solves. The first rank computes the bounds, too."""

        def local(windows: Tensor) -> Tensor:
            batches = windows.split(self.batch_size)
            return torch.cat([windows[:0], *batches[ranks.local_slice(len(batches))]])

        alike = {id(each): SamePruned(each, ranks.broadcast) for each in self.settings.pruners.values()}
        own = {name: alike[id(each)] for name, each in self.settings.pruners.items()}  # one rule is still one pruner
        shared = {id(each): local(each) for each in self.settings.token_weights.values()}
        settings = replace(
            self.settings,
            pruner=SamePruned(self.settings.pruner, ranks.broadcast),
            pruners=own,
            quantizer=SameQuantized(self.settings.quantizer, ranks.broadcast),
            bound_rows=0 if ranks.rank else self.settings.bound_rows,
            token_weights={name: shared[id(weights)] for name, weights in self.settings.token_weights.items()},
        )
        return Work(local(self.tokens), local(self.held_out), self.batch_size, settings, ranks)

    @property
    def validation_batches(self) -> list[Tensor]:
        """The batches that are never fitted, the last ones."""
        return list(self.held_out.split(self.batch_size)) if len(self.held_out) else []

    @property
    def batches(self) -> list[Tensor]:
        """All of them [batch length]."""
        return [*self.tokens.split(self.batch_size), *self.validation_batches]


@dataclass(frozen=True, eq=False)
class PruneStep:
    """Prunes a layer on what enters it, and puts it and what enters the next one away in the `store`.

    All that it reads is in the model and the store, and all that it leaves is in the store: done again, it leaves the
    same.

    Args:
        work: what layers are pruned on, and how.
    """

    store: AbstractStore
    work: Work
    on_operator: OnOperator

    def __call__(self, context: LayerContext) -> None:
        """Prune the layer."""
        settings, reports = self.work.settings, list[OperatorReport]()

        def report(operator: OperatorReport) -> None:
            reports.append(operator)
            self.on_operator(operator)

        layer, following = context.layer, context.number + 1
        more = following < len(context.model.layers) and not self.store.is_finished(following)
        observed = context.observe((settings.error_target,))
        if more:
            context.hand_on(observed.outputs)
        context.model.keep(layer)
        validation_batches, ranks = len(self.work.validation_batches), self.work.process_group
        hidden = HiddenStates(context.inputs["dense"], context.inputs[settings.prefix], validation_batches, ranks)
        if settings.emptied is not None:
            own = {name for name, _ in layer.module.named_parameters()}
            parameters = {name: tensor for name, tensor in context.model.state(layer).items() if name in own}
            context.model.load_state(layer, settings.emptied(layer.name, parameters))
        replayed = prune_observed(layer, context.calls, hidden, observed, settings, report, record=context.record)
        if more and settings.prefix == "pruned":
            context.hand_on(context.outputs("pruned", replayed), "pruned")
        self.store.finish(context.number, context.model.state(layer), reports)


def prune_claimed(model: AbstractModel, store: AbstractStore, work: Work, on_operator: OnOperator) -> None:
    """Prune one layer after another as the store hands them out, until all are finished, by whomever.

    With a dense prefix the next layer can be claimed by another worker as soon as this one has looked at what its dense
    layer makes of the tokens: before it is pruned.
    """
    LayerWalk(model, work.batches, store, work.settings.streams).run(PruneStep(store, work, on_operator))
