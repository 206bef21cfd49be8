"""Types by forecast loss for operators, embedding and head, within the bytes of a whole file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convexprune._container.layouts import imported
from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.context import propagate
from convexprune._layerwise.folder_store import ENDS
from convexprune._layerwise.model import DecoderLayer
from convexprune._layerwise.steps.survey import survey
from convexprune._layerwise.store import BLOCKS, AbstractStore, MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.constraints import Constraint, Quantized, Unstructured, make_grid
from convexprune.core import Moments
from convexprune.core._allocation import choose
from convexprune.errors import ModelError, PatternError
from convexprune.pruners import LayerEdit, LayerProblem
from convexprune.quantizers import AbstractQuantizer
from convexprune.quantizers._forecast import Forecast

from ._allocating import GRADIENTS, WINDOWS, followed, trial
from ._discovery.operators import ParameterOperator
from ._gradients import Fisher, loss_fisher
from ._huggingface import HuggingFaceModel

AT_ONCE = 2**24  # weights of an embedding that are quantized together
LEAST_STEP = 0.07  # of the bytes: types of nearly equal bits differ by little else than noise
DENSE = Unstructured(0.0)


@dataclass(frozen=True, eq=False)
class End:
    """The embedding or the head [words n], or both if tied. A row counts as often as its word is predicted."""

    weight: Tensor
    moments: Moments  # of the head's inputs; those of the embedding have the squared gradients at its outputs
    frequency: Tensor  # mean probability of words [words]

    @property
    def _at_once(self) -> int:
        return min(len(self.weight), max(1, AT_ONCE // self.weight.shape[1]))

    def costs(self, names: Iterable[str]) -> dict[str, float]:
        """Forecast the loss by the name of a grid, in nats per token, as `survey` does, from the frequent words."""
        frequency, words = self.frequency.topk(self._at_once)
        forecast = Forecast(LayerProblem(self.weight[words].float(), self.moments, DENSE, 0.0))
        errors = {name: forecast.errors(on_grid(name)).cpu().double() for name in names}
        return {name: float(error @ frequency / frequency.sum()) / 2 for name, error in errors.items()}

    def quantized(self, name: str, quantizer: AbstractQuantizer) -> tuple[Tensor, Tensor | None]:
        """Return the weight on a grid, as it is stored, and its bytes in a file of block grids."""
        weights, blocks = list[Tensor](), list[Tensor]()
        for rows in self.weight.split(self._at_once):
            problem = LayerProblem(rows.float(), self.moments, on_grid(name), 0.0)
            edit = quantizer.quantize(problem, LayerEdit(problem.weight, torch.ones_like(rows, dtype=torch.bool)))
            weights.append(edit.weight.to(self.weight.dtype).cpu())
            blocks += [block.cpu() for block in edit.blocks if block is not None]
        return torch.cat(weights), torch.cat(blocks) if blocks else None


@dataclass(frozen=True)
class TypeChoice:
    """The choice of types for a model, made once for all processes that share a store."""

    model: HuggingFaceModel
    calibration: Tensor
    batch_size: int
    ends: Sequence[str]  # names of embedding and head, if they get types
    quantizer: AbstractQuantizer
    rule: str = "curve"  # or "measured"

    def types(
        self, store: AbstractStore, pattern: Constraint, units: Mapping[tuple[str, ...], Mapping[str, int]], room: int
    ) -> dict[str, Any]:
        """Return the type of each operator, embedding and head, by name, with the forecast `cost` and its `gap`.

        The `units` are operators that have a common type, with their bytes by type; there is `room` for so many.
        """
        steps = [_step(units, room)] if self.rule == "measured" else []
        trials = [trial(step, self.batch_size, self.calibration.shape[1]) for step in steps]
        with store.scratch(0) as record:
            fisher = self._fisher(record)
            ends = self._judged(fisher, record)
            surveyed = survey(
                self.model, self._batches, 0, pattern.ladder(0, 0), fisher.outputs, record=record, trials=trials
            )
            for each in trials:
                surveyed = followed(self.model, surveyed, self._batches, each)
        fits = {name: sizes for names, sizes in units.items() for name in names}
        costs = {unit.name: {str(p.grid): cost for p, cost in unit.costs.items()} for unit in surveyed}
        costs |= {name: end.costs(fits[name]) for name, end in ends.items()}
        options = [
            [(nbytes, sum(costs[name][kind] for name in names)) for kind, nbytes in sizes.items()]
            for names, sizes in units.items()
        ]
        chosen, bound = choose(options, room)
        cost = sum(unit[k][1] for unit, k in zip(options, chosen, strict=True))
        pairs = zip(units.items(), chosen, strict=True)
        types = {name: list(sizes)[k] for (names, sizes), k in pairs for name in names}
        store.tensors_once(ENDS, lambda: self._quantized(types, ends))
        return {"types": types, "cost": cost, "gap": max(0.0, cost - bound)}

    def tensors(self, store: AbstractStore, types: Mapping[str, str]) -> Mapping[str, Tensor]:
        """Return embedding and head on the grids of their types, and as `BLOCKS` their bytes."""

        def make() -> Mapping[str, Tensor]:
            with store.scratch(0) as record:
                return self._quantized(types, self._judged(self._fisher(record), record))

        return store.tensors_once(ENDS, make)

    def _fisher(self, record: Callable[[], Recorded]) -> Fisher:
        return loss_fisher(self.model, self.calibration[:GRADIENTS], self.batch_size, record)

    @property
    def _batches(self) -> list[Tensor]:
        return list(self.calibration[:WINDOWS].split(self.batch_size))

    def _quantized(self, types: Mapping[str, str], ends: Mapping[str, End]) -> dict[str, Tensor]:
        step, found = begin("embedding and head", len(ends)), dict[str, Tensor]()
        for name, end in ends.items():
            found[f"{name}.weight"], blocks = end.quantized(types[name], self.quantizer)
            found |= {} if blocks is None else {f"{BLOCKS}{name}": blocks}
            step(name)
        return found

    @torch.no_grad()
    def _judged(self, fisher: Fisher, record: Callable[[], Recorded]) -> dict[str, End]:
        """Return embedding and head, with what judges them on the calibration windows."""
        if not self.ends:
            return {}
        model, modules = self.model, dict(self.model.model.named_modules())
        head, embedding = model.model.get_output_embeddings(), model.model.get_input_embeddings()
        assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
        tokens = sum(batch.numel() for batch in self._batches)
        entering, (outputs, frequency) = fisher.embedding, self._of_head(record, head)
        inputs = Moments(len(entering), device=outputs.sum.device)
        inputs.sum, inputs.tokens = torch.diag(entering.to(inputs.sum) * tokens), tokens
        if model.model.config.tie_word_embeddings:
            outputs.sum += inputs.sum * (outputs.tokens / tokens)
            inputs = outputs
        judged = {id(embedding): (embedding.weight, inputs), id(head): (head.weight, outputs)}
        return {name: End(*judged[id(modules[name])], frequency) for name in self.ends}

    def _of_head(self, record: Callable[[], Recorded], head: nn.Linear) -> tuple[Moments, Tensor]:
        """Return the moments of the head's inputs, and the mean probabilities of words."""
        states, count = MemoryStore(range(len(self.model.layers)), record), len(self.model.layers)
        on_layer = begin("what the head reads", count)
        LayerWalk(self.model, self._batches, states, on_layer=on_layer).run(propagate)
        moments = Moments(head.in_features, device=self.model.device)
        frequency = torch.zeros(head.out_features, dtype=torch.float64)
        for ids, hidden in zip(self._batches, states.take(count), strict=True):
            moments.add(self.model.normed(ids, hidden).float())
            for positions in self.model.pieces(ids):
                logits = self.model.logits(ids, hidden, positions).float()
                frequency += logits.softmax(-1).sum((0, 1), dtype=torch.float64).cpu()
        return moments, frequency / frequency.sum()


def _step(units: Mapping[tuple[str, ...], Mapping[str, int]], room: int) -> tuple[Constraint, Constraint]:
    """Return the best type that all `units` can have in the `room`, and the next smaller one; larger, if none is."""
    common = set[str].intersection(*(set(sizes) for sizes in units.values()))
    totals = sorted((sum(sizes[kind] for sizes in units.values()), kind) for kind in common)
    fitting = [each for each in totals if each[0] <= room] or totals[:1]
    smaller = [kind for total, kind in totals if total < (1 - LEAST_STEP) * fitting[-1][0]]
    larger = [kind for total, kind in totals if total > (1 + LEAST_STEP) * fitting[-1][0]]
    if not smaller + larger:
        raise PatternError(
            "Allocation 'measured' needs types of two sizes: it compares two types for all operators, and "
            f"{' or '.join(sorted(common)) or 'none'} fits all. Take 'curve'."
        )
    return on_grid(fitting[-1][1]), on_grid([*smaller[-1:], *larger][0])


def on_grid(name: str) -> Constraint:
    """Return the constraint of all weights on the grid of a description."""
    return Quantized(DENSE, make_grid(name))


def alike(layers: Sequence[DecoderLayer]) -> list[list[str]]:
    """Return operators that engines join and that therefore have a common type: those of an input, or all experts."""
    groups, experts = list[list[str]](), list[str]()
    for layer in layers:
        for group in layer.groups:
            names = [f"{layer.name}.{operator.name}" for operator in group.operators]
            if any(
                isinstance(operator, ParameterOperator) and operator.place.transposed for operator in group.operators
            ):
                raise ModelError(f"{names[0]} is no Linear module, and files take no other. Take bits, and pack.")
            if group.token_aligned:
                groups.append(names)
            else:
                experts += names
    return [*groups, experts] if experts else groups


def require_exportable(
    folder: Path | None, layers: Sequence[DecoderLayer], ends: Iterable[str], left_alone: Iterable[str]
) -> None:
    """Refuse, before a run, a model whose codes no file of compressed-tensors can hold."""
    alike(layers)
    if folder is not None and any(folder.glob("*.safetensors")):
        operators = sum(prod(operator.shape) for layer in layers for operator in layer.operators)
        imported("compressed-tensors").require_matrices(folder, operators, ends, left_alone)


def ends(model: HuggingFaceModel) -> list[str]:
    """Return the names of embedding and head; of the head only if it is not the embedding."""
    inner = model.model
    names = {id(module): name for name, module in inner.named_modules()}
    both = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    tied = getattr(inner.config.get_text_config(), "tie_word_embeddings", False)
    return [names[id(module)] for module in both[: 1 if tied else 2] if module is not None]
