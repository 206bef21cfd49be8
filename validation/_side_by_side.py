"""Methods side by side on the same tokens: decoder layers outermost, so that common work is done once.

A dense pass of a layer serves every variant, and the moments of the first stage serve all variants with a dense prefix.
Then a variant prunes the layer, sends its evaluation text through the layer, and the dense weights are restored: no
pruned model is ever kept, and a single problem is in memory at a time.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune._layerwise.capture import CachedSubmodule, Recorded, through
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import DecoderLayer
from convexprune._layerwise.pipeline import Pipeline
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.stages import Statistics, stage_statistics
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._layerwise.work import stack_steps
from convexprune._storage.batches import Batches
from convexprune._storage.failures import writing
from convexprune._storage.files import read_json, write_json
from convexprune.adapters import HuggingFaceModel, Likelihood, likelihoods
from convexprune.errors import OutputError
from convexprune.pruners import AbstractPruner, LayerEdit, LayerProblem
from convexprune.report import OperatorReport

from ._timing import peak_memory


class Store:
    """Files, which appear whole, of hidden states, until all readers have a record, and of records, by network."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device

    def write_states(self, network: str, layer: int, stream: str, batches: Iterable[Tensor]) -> None:
        """Keep hidden states [batch tokens hidden] before a decoder layer, by batch."""
        path = self._states(network, layer, stream)
        temporary = path.with_suffix(".part")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
        recorded = Batches(temporary)
        for batch in batches:
            recorded.append(batch)
        recorded.keep(path)

    def states(self, network: str, layer: int, stream: str) -> Batches:
        path = self._states(network, layer, stream)
        if (found := Batches.kept(path, self._device)) is None:
            raise OutputError(f"{path} is missing or damaged. Remove {self._folder}, and begin the comparison again.")
        return found

    def drop_states(self, network: str, layer: int) -> None:
        shutil.rmtree(self._states(network, layer, "").parent, ignore_errors=True)

    def record(self, network: str, layer: int, facts: Any) -> None:
        write_json(self._place(network) / f"layer-{layer:03d}.json", facts)

    def recorded(self, network: str, layer: int) -> Any:
        return read_json(self._place(network) / f"layer-{layer:03d}.json")

    def _states(self, network: str, layer: int, stream: str) -> Path:
        return self._place(network) / f"states-{layer:03d}" / f"{stream}.bin"

    def _place(self, network: str) -> Path:
        return self._folder / "".join(c if c.isalnum() or c in ".=-" else "_" for c in network)


DENSE = "dense"
FITTED = "fitted"  # the stream of the calibration batches, and of those held out after them


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids [windows length]: to fit, to judge by (maybe none), and texts to evaluate on, by name."""

    calibration: Tensor
    held_out: Tensor
    texts: Mapping[str, Tensor]

    @property
    def streams(self) -> dict[str, Tensor]:
        texts = {_stream(name): windows for name, windows in self.texts.items()}
        streams = {"calibration": self.calibration, "held-out": self.held_out} | texts
        return {name: windows for name, windows in streams.items() if len(windows)}

    def batches(self, size: int) -> dict[str, list[Tensor]]:
        """Return the batches that go through the network, by name of their states on disk."""
        validation_batches = list(self.held_out.split(size)) if len(self.held_out) else []
        fitted = {FITTED: [*self.calibration.split(size), *validation_batches]}
        return fitted | {_stream(name): list(windows.split(size)) for name, windows in self.texts.items()}


class Comparison:
    """A walk through decoder layers with all variants in a layer. Work recorded in `store` is not repeated."""

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
        return len(self._model.layers) * len(self._networks)

    @torch.no_grad()
    def run(self, on_layer: Callable[[str], None]) -> None:
        """Prune every decoder layer by every variant; `on_layer` takes the name of a finished layer."""
        if self._store.recorded(DENSE, 0) is None:
            for stream, batches in self._batches.items():
                self._store.write_states(DENSE, 0, stream, map(self._model.first_inputs, batches))
            self._store.record(DENSE, 0, {})

        def step(context: LayerContext) -> None:
            todo = self._todo(context.number)
            self._layer(context, todo, on_layer)
            self._let_go(context.number, todo, on_layer)

        numbers = range(len(self._model.layers))
        pending = [number for number in numbers if self._todo(number)]
        for number in set(numbers).difference(pending):
            self._let_go(number, (), on_layer)
        windows = list(chain.from_iterable(self._batches.values()))
        LayerWalk(self._model, windows, MemoryStore(pending), streams=()).run(step)

    def _todo(self, number: int) -> list[str]:
        return [name for name in self._networks if self._store.recorded(name, number + 1) is None]

    def _let_go(self, number: int, todo: Sequence[str], on_layer: Callable[[str], None]) -> None:
        """Drop the inputs of a layer once all networks have a record."""
        for name in self._networks:
            self._store.drop_states(name, number)
            if name not in todo:
                on_layer(f"layer {number}, {name}: was done")

    @torch.no_grad()
    def likelihoods(self) -> dict[str, dict[str, Likelihood]]:
        last, found = len(self._model.layers), {}
        for name in self._tokens.texts:
            states = {network: self._store.states(network, last, _stream(name)) for network in self._networks}
            found[name] = likelihoods(self._model, self._batches[_stream(name)], states.pop(DENSE), states)
        return found

    def records(self, network: str) -> list[dict[str, Any]]:
        return [self._store.recorded(network, number + 1) for number in range(len(self._model.layers))]

    def _layer(self, context: LayerContext, todo: Sequence[str], on_layer: Callable[[str], None]) -> None:
        """Do the dense pass of a decoder layer, which all need, and the variants."""
        number, layer, began = context.number, context.layer, time.perf_counter()
        hidden = self._states(DENSE, number, FITTED)
        context = replace(context, inputs={"dense": hidden}, held_out=self._held_out)
        observed = context.observe({each.error_target for each in self._variants.values()})
        if DENSE in todo:
            for stream in self._batches:
                batches = observed.outputs if stream == FITTED else self._through(context, DENSE, stream)
                self._store.write_states(DENSE, number + 1, stream, batches)
            self._store.record(DENSE, number + 1, {"seconds": time.perf_counter() - began})
            on_layer(f"layer {number}, dense")
        first: dict[int, Statistics] = {}  # by the token weights
        for name in todo:
            if name == DENSE:
                continue
            settings = self._variants[name]
            weights = id(settings.token_weights)
            if settings.prefix == "dense" and weights not in first and layer.stages:
                context.begin_pass("dense", edits=False)
                parts = stage_statistics(context, settings, 0)
                first[weights] = {g: f for part in parts for g, f in part.items()}
            with _put_back(layer):
                record, known = self._prune(context, name, first.get(weights, {}))
                for stream in self._batches:
                    if stream == FITTED and settings.prefix == "dense":
                        continue
                    taken = known if stream == FITTED else None
                    self._store.write_states(name, number + 1, stream, self._through(context, name, stream, taken))
            self._store.record(name, number + 1, record)
            on_layer(f"layer {number}, {name}")

    def _prune(
        self, context: LayerContext, name: str, first: Statistics
    ) -> tuple[dict[str, Any], dict[CachedSubmodule, Recorded]]:
        """Prune a layer by a variant; return the record, and cached submodules for later passes."""
        number, layer, settings = context.number, context.layer, self._variants[name]
        inputs = context.inputs
        if settings.prefix == "pruned":
            inputs, first = {**inputs, "pruned": self._states(name, number, FITTED)}, {}
        watched, reports = Watched(settings.pruner), []
        settings = replace(settings, pruner=watched)
        began = time.perf_counter()
        with peak_memory(self._device) as peak:
            own = replace(context, inputs=inputs, first=first)
            Pipeline(settings, stack_steps(settings, reports.append))(own)
        seconds = time.perf_counter() - began
        record = {
            "operators": [asdict(report) for report in reports],
            "output_error": self._output_error(context),
            "products": watched.products(layer, reports),
            "solve_seconds": watched.seconds,
            "seconds": seconds,
            "peak_bytes": peak.total,
            "more_bytes": peak.more,
        }
        return record, own.replayed

    def _output_error(self, context: LayerContext) -> float | None:
        """Median over the held-out tokens of |y* - y|^2 / |y - x|^2: dense input x, dense and pruned output y, y*."""
        dense, ratios = context.inputs["dense"], []
        for i in range(len(dense) - self._held_out, len(dense)):
            x, y = dense[i], context.observed.outputs[i]
            wrong = context.calls(x)(context.layer.module, x) - y
            ratios.append((wrong.float().square().sum(-1) / (y - x).float().square().sum(-1)).flatten())
        return float(torch.cat(ratios).median()) if ratios else None

    def _states(self, name: str, number: int, stream: str) -> Sequence[Tensor]:
        """Return the inputs of a decoder layer; before the first layer nothing is pruned."""
        return self._store.states(name if number else DENSE, number, stream)

    def _through(
        self, context: LayerContext, name: str, stream: str, known: Mapping[CachedSubmodule, Recorded] | None = None
    ) -> Iterator[Tensor]:
        states = self._states(name, context.number, stream)
        return through(context.layer, context.calls, states, known)


@dataclass
class Watched(AbstractPruner):
    """A pruner with a clock and a counter of matrix products."""

    pruner: AbstractPruner
    seconds: float = 0.0
    surplus: float = 0.0  # products of single operators, in units of whole stacks

    def prune(self, problem: LayerProblem) -> LayerEdit:
        began = time.perf_counter()
        pruned = self.pruner.prune(problem)
        if pruned.weight.is_cuda:
            torch.cuda.synchronize(pruned.weight.device)
        self.seconds += time.perf_counter() - began
        for solution in pruned.solutions:
            self.surplus += solution.products * (1 - len(solution.weight) / len(pruned.weight))
        return pruned

    def products(self, layer: DecoderLayer, reports: Iterable[OperatorReport]) -> float:
        """Return products [m n] x [n n] of whole stacks, which all reports of a group repeat, as a mean over groups."""
        leaders = {f"{layer.name}.{group.operators[0].name}" for group in layer.groups}
        return (sum(r.products for r in reports if r.name in leaders) - self.surplus) / max(1, len(leaders))


@contextmanager
def _put_back(layer: DecoderLayer) -> Iterator[None]:
    before = {operator: operator.read().clone() for operator in layer.operators}
    try:
        yield
    finally:
        for operator, weight in before.items():
            operator.write(weight)


def _stream(text: str) -> str:
    return f"text {text}"
