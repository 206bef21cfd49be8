"""Variants on the same tokens, one after another: each is pruned layer by layer, as `prune` does it, and measured."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from convexprune._layerwise.capture import Recorded, through
from convexprune._layerwise.context import LayerContext, recorded
from convexprune._layerwise.model import DecoderLayer, put_back
from convexprune._layerwise.settings import LayerSettings, Stream
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerCalls, LayerStep, LayerWalk
from convexprune._layerwise.work import Work, prune_layer
from convexprune._storage.batches import Batches
from convexprune._storage.files import read_json, write_json
from convexprune.adapters import HuggingFaceModel, Likelihood, likelihoods
from convexprune.pruners import AbstractPruner, LayerEdit, LayerProblem
from convexprune.report import OperatorReport

from ._timing import peak_memory

DENSE = "dense"


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


class Comparison:
    """Variants of a dense model in memory. Variants with a record in the folder are not measured again."""

    def __init__(
        self,
        model: HuggingFaceModel,
        tokens: Tokens,
        variants: Mapping[str, LayerSettings],
        folder: Path,
        batch_size: int = 1,
        tasks: Callable[[HuggingFaceModel], Sequence[Any]] | None = None,
    ) -> None:
        self._model, self._tokens, self._variants, self._folder = model, tokens, variants, folder
        self._batch_size, self._tasks = batch_size, tasks
        self._texts = {name: list(windows.split(batch_size)) for name, windows in tokens.texts.items()}
        fitted = (windows.split(batch_size) for windows in (tokens.calibration, tokens.held_out) if len(windows))
        self._fitted = list(chain.from_iterable(fitted))

    @property
    def units(self) -> int:
        return len(self._model.layers) * (1 + len(self._variants))

    def record(self, name: str) -> Any:
        return read_json(self._path(name))

    @torch.no_grad()
    def run(self, on_layer: Callable[[str], None]) -> None:
        """Measure the dense model and every variant; `on_layer` takes the name of a finished layer."""
        began = time.perf_counter()
        calls = LayerCalls(self._model, [*self._fitted, *chain.from_iterable(self._texts.values())])

        def walk(name: str, states: MemoryStore, step: LayerStep, streams: Sequence[Stream] = ()) -> None:
            def tell(layer: str) -> None:
                on_layer(f"{layer}, {name}")

            LayerWalk(self._model, self._fitted, states, streams, tell, calls).run(step)

        with self._states() as states:
            walk(DENSE, states, self._through_texts)
            if self.record(DENSE) is None:
                seconds = time.perf_counter() - began
                write_json(self._path(DENSE), {"seconds": seconds, "tasks": self._scores()})
            for name in self._variants:
                if self.record(name) is None:
                    self._measure(name, self._final(states), walk)
                    continue
                for layer in self._model.layers:
                    on_layer(f"{layer.name}, {name}: was done")

    def likelihoods(self) -> dict[str, dict[str, Likelihood]]:
        """Return the likelihoods by text and network; all variants have that of the dense model."""
        found: dict[str, dict[str, Likelihood]] = {text: {} for text in self._texts}
        for name in self._variants:
            for text, networks in self.record(name)["texts"].items():
                found[text] |= {DENSE: Likelihood(**networks[DENSE]), name: Likelihood(**networks[name])}
        return found

    def _measure(self, name: str, dense: Mapping[str, Recorded], walk: Callable[..., None]) -> None:
        settings, layers = self._variants[name], list[dict[str, Any]]()

        def step(context: LayerContext) -> None:
            with ExitStack() as until_the_next:
                (until_the_end if self._tasks else until_the_next).enter_context(put_back(context.layer.operators))
                layers.append(self._pruned(context, settings))
                self._through_texts(context)

        with self._states() as states:
            with ExitStack() as until_the_end:
                walk(name, states, step, settings.streams)
                tasks = self._scores()
            began, last = time.perf_counter(), self._final(states)
            found = {
                text: likelihoods(self._model, batches, dense[text], {name: last[text]})
                for text, batches in self._texts.items()
            }
        texts = {text: {network: asdict(each) for network, each in of.items()} for text, of in found.items()}
        spent = time.perf_counter() - began
        write_json(self._path(name), {"layers": layers, "texts": texts, "tasks": tasks, "evaluation_seconds": spent})

    def _scores(self) -> list[dict[str, Any]]:
        return [asdict(score) for score in self._tasks(self._model)] if self._tasks else []

    def _pruned(self, context: LayerContext, settings: LayerSettings) -> dict[str, Any]:
        """Prune a layer by a variant, and return what is to be recorded of it."""
        watched, reports, began = Watched(settings.pruner), list[OperatorReport](), time.perf_counter()
        settings = replace(settings, pruner=watched)
        work = Work(self._tokens.calibration, self._tokens.held_out, self._batch_size, settings)
        with peak_memory(self._model.device) as peak:
            prune_layer(context.states, work, reports.append, context)
        return {
            "operators": [asdict(report) for report in reports],
            "seconds": time.perf_counter() - began,
            "output_error": _output_error(context),
            "products": watched.products(context.layer, reports),
            "solve_seconds": watched.seconds,
            "peak_bytes": peak.total,
            "more_bytes": peak.more,
        }

    def _through_texts(self, context: LayerContext) -> None:
        """Send the texts to evaluate on through the layer as it is."""
        states: Any = context.states
        for name, batches in self._texts.items():
            entering = states.hidden(context.number, _stream(name)) or [*map(self._model.first_inputs, batches)]
            outputs = recorded(through(context.layer, context.calls, entering), context.record())
            states.put_hidden(context.number + 1, _stream(name), outputs)

    def _final(self, states: Any) -> dict[str, Recorded]:
        return {name: states.hidden(len(self._model.layers), _stream(name)) for name in self._texts}

    @contextmanager
    def _states(self) -> Iterator[MemoryStore]:
        """Yield a store of hidden states on the disk, which are gone after the block."""
        with TemporaryDirectory(dir=self._folder) as place:

            def record() -> Batches:
                return Batches(Path(place, f"{uuid4().hex}.bin"), device=self._model.device)

            yield MemoryStore(range(len(self._model.layers)), record)

    def _path(self, name: str) -> Path:
        return self._folder / f"{''.join(c if c.isalnum() or c in '.=-' else '_' for c in name)}.json"


def _output_error(context: LayerContext) -> float | None:
    """Median over the held-out tokens of |y* - y|^2 / |y - x|^2: dense input x, dense and pruned output y, y*."""
    dense, ratios = context.inputs["dense"], []
    for i in range(len(dense) - context.held_out, len(dense)):
        x, y = dense[i], context.observed.outputs[i]
        wrong = context.calls(x)(context.layer.module, x) - y
        ratios.append((wrong.float().square().sum(-1) / (y - x).float().square().sum(-1)).flatten())
    return float(torch.cat(ratios).median()) if ratios else None


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


def _stream(text: str) -> str:
    return f"text {text}"
