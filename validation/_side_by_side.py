"""Methods side by side on the same tokens: decoder layers outermost, so that what methods share is computed once.

Of each layer, one dense pass serves every variant, and one set of moments of the first stage all that have a dense
prefix. Then each variant prunes the layer, sends its own evaluation text through it, and the dense weights are put
back: no pruned model is ever kept, and one problem is in memory at a time.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from convexprune._layerwise.capture import Observed, Recorded, observe, through
from convexprune._layerwise.model import DecoderLayer, Group
from convexprune._layerwise.replay import CachedSubmodule
from convexprune._layerwise.settings import HiddenStates, LayerSettings
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune._layerwise.steps.stages import prune_observed, stage_folds
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerContext, LayerWalk
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._data.likelihood import Likelihood, likelihoods
from convexprune.pruners import AbstractPruner, LayerEdit, LayerProblem
from convexprune.report import OperatorReport

from ._memory import peak_memory
from ._states import Store

DENSE = "dense"
FITTED = "fitted"  # the stream of the calibration batches, and of those held out after them


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids: calibration windows to fit, held-out windows to judge by, and texts to evaluate on, by name.

    All are [windows length]; the held-out windows may be none.

    Args:
        calibration: [windows length].
        held_out: [windows length], may be none.
        texts: [windows length] by name.
    """

    calibration: Tensor
    held_out: Tensor
    texts: Mapping[str, Tensor]

    @property
    def streams(self) -> dict[str, Tensor]:
        """All windows, by what they are for."""
        streams = {"calibration": self.calibration, "held-out": self.held_out}
        streams |= {_stream(name): windows for name, windows in self.texts.items()}
        return {name: windows for name, windows in streams.items() if len(windows)}

    def batches(self, size: int) -> dict[str, list[Tensor]]:
        """What goes through the network, batch by batch, by the name of its states on disk."""
        validation_batches = list(self.held_out.split(size)) if len(self.held_out) else []
        fitted = {FITTED: [*self.calibration.split(size), *validation_batches]}
        return fitted | {_stream(name): list(windows.split(size)) for name, windows in self.texts.items()}


class Comparison:
    """A walk through decoder layers with the variants in each; what is recorded in `store` is not done again."""

    def __init__(
        self,
        model: HuggingFaceModel,
        tokens: Tokens,
        variants: Mapping[str, LayerSettings],
        store: Store,
        batch_size: int = 1,
    ) -> None:
        self._model, self._tokens, self._variants, self._store = model, tokens, variants, store
        self._batches, self._device = tokens.batches(batch_size), model.device
        self._held_out = -(-len(tokens.held_out) // batch_size)
        self._networks = (DENSE, *variants)

    @property
    def units(self) -> int:
        """How often `run` calls `on_layer`."""
        return len(self._model.layers) * len(self._networks)

    @torch.no_grad()
    def run(self, on_layer: Callable[[str], None]) -> None:
        """Prune every decoder layer by every variant; `on_layer` is called with the name of each."""
        if self._store.recorded(DENSE, 0) is None:
            for stream, batches in self._batches.items():
                self._store.write_states(DENSE, 0, stream, map(self._model.first_inputs, batches))
            self._store.record(DENSE, 0, {})

        def step(context: LayerContext) -> None:
            todo = self._todo(context.number)
            self._layer(context, todo, on_layer)
            self._let_go(context.number, todo, on_layer)

        pending = list[int]()
        for number in range(len(self._model.layers)):
            if self._todo(number):
                pending.append(number)
            else:
                self._let_go(number, (), on_layer)
        windows = list(chain.from_iterable(self._batches.values()))
        LayerWalk(self._model, windows, MemoryStore(pending), streams=()).run(step)

    def _todo(self, number: int) -> list[str]:
        """The networks of which the layer is not recorded yet."""
        return [name for name in self._networks if self._store.recorded(name, number + 1) is None]

    def _let_go(self, number: int, todo: Sequence[str], on_layer: Callable[[str], None]) -> None:
        """Drop what entered a layer that is recorded of all networks; of those not `todo` it was before."""
        for name in self._networks:
            self._store.drop_states(name, number)
            if name not in todo:
                on_layer(f"layer {number}, {name}: was done")

    @torch.no_grad()
    def likelihoods(self) -> dict[str, dict[str, Likelihood]]:
        """For each text, of the dense model and of each variant; to be asked once `run` is through."""
        last, found = len(self._model.layers), {}
        for name in self._tokens.texts:
            states = {network: self._store.states(network, last, _stream(name)) for network in self._networks}
            found[name] = likelihoods(self._model, self._batches[_stream(name)], states.pop(DENSE), states)
        return found

    def records(self, network: str) -> list[dict[str, Any]]:
        """What was recorded of a network, decoder layer by decoder layer."""
        return [self._store.recorded(network, number + 1) for number in range(len(self._model.layers))]

    def _layer(self, context: LayerContext, todo: Sequence[str], on_layer: Callable[[str], None]) -> None:
        """Whatever is to do on one decoder layer. The dense pass is needed for any of it."""
        number, layer, calls, began = context.number, context.layer, context.calls, time.perf_counter()
        hidden = self._states(DENSE, number, FITTED)
        observed = observe(layer, calls, hidden, error_targets={each.error_target for each in self._variants.values()})
        if DENSE in todo:
            for stream in self._batches:
                batches = observed.outputs if stream == FITTED else self._through(context, DENSE, stream)
                self._store.write_states(DENSE, number + 1, stream, batches)
            self._store.record(DENSE, number + 1, {"seconds": time.perf_counter() - began})
            on_layer(f"layer {number}, dense")
        first: dict[int, dict[Group, CalibrationStatistics]] = {}  # by the token weights
        for name in todo:
            if name == DENSE:
                continue
            settings = self._variants[name]
            weights = id(settings.token_weights)
            if settings.prefix == "dense" and weights not in first and layer.stages:
                states = HiddenStates(hidden, hidden, self._held_out)
                inputs = dict(observed.inputs)
                parts = stage_folds(layer, 0, calls, states, observed, settings, inputs)
                first[weights] = {g: f for part in parts for g, f in part.items()}
            with _put_back(layer):
                record, known = self._prune(context, name, observed, first.get(weights, {}))
                for stream in self._advanced(name):
                    taken = known if stream == FITTED else None
                    self._store.write_states(name, number + 1, stream, self._through(context, name, stream, taken))
            self._store.record(name, number + 1, record)
            on_layer(f"layer {number}, {name}")

    def _prune(
        self, context: LayerContext, name: str, observed: Observed, first: Mapping[Group, CalibrationStatistics]
    ) -> tuple[dict[str, Any], dict[CachedSubmodule, Recorded]]:
        """Prune one layer by one variant; what came of it, and what is known for later passes of what was fitted."""
        number, layer, settings = context.number, context.layer, self._variants[name]
        dense = self._states(DENSE, number, FITTED)
        pruned = dense if settings.prefix == "dense" else self._states(name, number, FITTED)
        hidden = HiddenStates(dense, pruned, self._held_out)
        watched, reports = Watched(settings.pruner), []
        began = time.perf_counter()
        with peak_memory(self._device) as peak:
            known = prune_observed(
                layer,
                context.calls,
                hidden,
                observed,
                replace(settings, pruner=watched),
                reports.append,
                first if settings.prefix == "dense" else None,
            )
        seconds = time.perf_counter() - began
        record = {
            "operators": [asdict(report) for report in reports],
            "output_error": self._output_error(context, dense, observed),
            "products": watched.products(layer, reports),
            "solve_seconds": watched.seconds,
            "seconds": seconds,
            "peak_bytes": peak.total,
            "more_bytes": peak.more,
        }
        return record, known

    def _output_error(self, context: LayerContext, dense: Sequence[Tensor], observed: Observed) -> float | None:
        """Median over the held-out tokens of |y* - y|^2 / |y - x|^2: dense input x, dense and pruned output y, y*."""
        ratios = []
        for i in range(len(dense) - self._held_out, len(dense)):
            x, y = dense[i], observed.outputs[i]
            wrong = context.calls(x)(context.layer.module, x) - y
            ratios.append((wrong.float().square().sum(-1) / (y - x).float().square().sum(-1)).flatten())
        return float(torch.cat(ratios).median()) if ratios else None

    def _states(self, name: str, number: int, stream: str) -> Sequence[Tensor]:
        """What enters a decoder layer; before the first, nothing is pruned yet."""
        return self._store.states(name if number else DENSE, number, stream)

    def _through(
        self, context: LayerContext, name: str, stream: str, known: Mapping[CachedSubmodule, Recorded] | None = None
    ) -> Iterator[Tensor]:
        """What the layer, as it is by now, makes of a stream."""
        states = self._states(name, context.number, stream)
        return through(context.layer, context.calls, states, known)

    def _advanced(self, name: str) -> list[str]:
        """The streams that a variant has states of its own for."""
        return [s for s in self._batches if s != FITTED or self._variants[name].prefix == "pruned"]


@dataclass
class Watched(AbstractPruner):
    """A pruner whose seconds are taken, and whose matrix products are counted.

    Args:
        seconds: that it took so far.
        surplus: products of single operators, in those of whole stacks.
    """

    pruner: AbstractPruner
    seconds: float = 0.0
    surplus: float = 0.0

    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`."""
        began = time.perf_counter()
        pruned = self.pruner.prune(problem)
        if pruned.weight.is_cuda:
            torch.cuda.synchronize(pruned.weight.device)
        self.seconds += time.perf_counter() - began
        for solution in pruned.solutions:
            self.surplus += solution.products * (1 - len(solution.weight) / len(pruned.weight))
        return pruned

    def products(self, layer: DecoderLayer, reports: Iterable[OperatorReport]) -> float:
        """Products [m n] x [n n] of whole stacks, mean over the layer's groups.

        Each report of a group counts the group's products; a product of one operator of a stack is a part of one.
        """
        leaders = {f"{layer.name}.{group.operators[0].name}" for group in layer.groups}
        return (sum(r.products for r in reports if r.name in leaders) - self.surplus) / max(1, len(leaders))


@contextmanager
def _put_back(layer: DecoderLayer) -> Iterator[None]:
    """The weights of the layer are afterwards what they were."""
    before = {operator: operator.read().clone() for operator in layer.operators}
    try:
        yield
    finally:
        for operator, weight in before.items():
            operator.write(weight)


def _stream(text: str) -> str:
    return f"text {text}"
