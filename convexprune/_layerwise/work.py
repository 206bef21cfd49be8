"""The work of a run: windows and settings for all layers, and the steps of a layer."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractModel
from convexprune._layerwise.pipeline import AbstractLayerStep, AbstractStackStep, Pipeline
from convexprune._layerwise.processes import ALONE, ProcessGroup
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.steps.measure import Measure
from convexprune._layerwise.steps.observe import Observe, Remove
from convexprune._layerwise.steps.prune import Prune, Quantize, Repair
from convexprune._layerwise.steps.refine import Refine
from convexprune._layerwise.store import BLOCKS, AbstractStore
from convexprune._layerwise.walk import LayerWalk
from convexprune.report import OnOperator, OperatorReport


def stack_steps(settings: LayerSettings, on_operator: OnOperator) -> list[AbstractLayerStep | AbstractStackStep]:
    refined = [] if settings.refinement is None else [Refine(settings, settings.refinement)]
    return [Prune(), Repair(), Quantize(), *refined, Measure(on_operator)]


def layer_steps(settings: LayerSettings, on_operator: OnOperator) -> list[AbstractLayerStep | AbstractStackStep]:
    removal = [] if settings.emptied is None else [Remove(settings.emptied)]
    return [Observe((settings.error_target,)), *removal, *stack_steps(settings, on_operator)]


@dataclass(frozen=True, eq=False)
class Work:
    """Windows [samples length] to fit and to judge by, settings, and the processes that prune a layer together."""

    tokens: Tensor
    held_out: Tensor
    batch_size: int
    settings: LayerSettings
    ranks: ProcessGroup = ALONE

    def of_rank(self, ranks: ProcessGroup) -> "Work":
        """Return the part of a rank: a share of the batches, and all solves. Only the first rank computes bounds."""

        def local(windows: Tensor) -> Tensor:
            batches = windows.split(self.batch_size)
            return torch.cat([windows[:0], *batches[ranks.local_slice(len(batches))]])

        shared = {id(each): local(each) for each in self.settings.token_weights.values()}
        settings = replace(
            self.settings,
            bound_rows=0 if ranks.rank else self.settings.bound_rows,
            token_weights={name: shared[id(weights)] for name, weights in self.settings.token_weights.items()},
        )
        return Work(local(self.tokens), local(self.held_out), self.batch_size, settings, ranks)

    @property
    def validation_batches(self) -> list[Tensor]:
        return list(self.held_out.split(self.batch_size)) if len(self.held_out) else []

    @property
    def batches(self) -> list[Tensor]:
        return [*self.tokens.split(self.batch_size), *self.validation_batches]


def prune_layer(store: AbstractStore, work: Work, on_operator: OnOperator, context: LayerContext) -> None:
    """Prune a layer, and put it and the next layer's inputs away in the store: a repeated call leaves the same."""
    settings, reports = work.settings, list[OperatorReport]()

    def report(operator: OperatorReport) -> None:
        reports.append(operator)
        on_operator(operator)

    context.held_out, context.ranks = len(work.validation_batches), work.ranks
    context.model.keep(context.layer)
    Pipeline(settings, layer_steps(settings, report))(context)
    if settings.prefix == "pruned" and not context.is_last:
        context.hand_on(context.outputs("pruned", context.replayed), "pruned")
    blocks = {BLOCKS + name: data for name, data in context.blocks.items() if data is not None}
    store.finish(context.number, context.model.state(context.layer) | blocks, reports)


def prune_claimed(model: AbstractModel, store: AbstractStore, work: Work, on_operator: OnOperator) -> None:
    """Prune layers as the store hands them out; with a dense prefix the next can be claimed before this is pruned."""
    step = partial(prune_layer, store, work, on_operator)
    LayerWalk(model, work.batches, store, work.settings.streams).run(step)
