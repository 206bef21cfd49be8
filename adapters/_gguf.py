"""Types of a GGUF file by forecast loss: for operators, embedding and head, within the bytes of the whole file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.context import propagate
from convexprune._layerwise.folder_store import ENDS, FolderStore
from convexprune._layerwise.steps.survey import survey
from convexprune._layerwise.store import BLOCKS, MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.constraints import AnyBlock, Constraint, Quantized, Unstructured, make_grid
from convexprune.core import Moments
from convexprune.core._allocation import choose
from convexprune.pruners import LayerEdit, LayerProblem
from convexprune.quantizers import AbstractQuantizer
from convexprune.quantizers._forecast import Forecast

from ._allocating import GRADIENTS, WINDOWS
from ._gradients import Fisher, loss_fisher
from ._huggingface import HuggingFaceModel

BLOCK = 32  # block grids have their own groups
AT_ONCE = 2**24  # weights of an embedding that are quantized together
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

    def quantized(self, name: str, quantizer: AbstractQuantizer) -> tuple[Tensor, Tensor]:
        """Return the weight on a grid, as it is stored, and its bytes in a file."""
        weights, blocks = list[Tensor](), list[Tensor]()
        for rows in self.weight.split(self._at_once):
            problem = LayerProblem(rows.float(), self.moments, on_grid(name), 0.0)
            edit = quantizer.quantize(problem, LayerEdit(problem.weight, torch.ones_like(rows, dtype=torch.bool)))
            weights.append(edit.weight.to(self.weight.dtype).cpu())
            blocks += [block.cpu() for block in edit.blocks if block is not None]
        return torch.cat(weights), torch.cat(blocks)


@dataclass(frozen=True)
class TypeChoice:
    """The choice of types for a model, made once for all processes that share a store."""

    model: HuggingFaceModel
    calibration: Tensor
    batch_size: int
    units: Mapping[tuple[str, ...], Mapping[str, int]]  # bytes by type, of operators that have a common type
    ends: Sequence[str]  # names of embedding and head
    room: int  # bytes for all units
    quantizer: AbstractQuantizer

    def types(self, store: FolderStore) -> dict[str, Any]:
        """Return the type of each operator, embedding and head, by name, with the forecast `cost` and its `gap`."""
        return store.compute_once("types", lambda: self._found(store))

    def tensors(self, store: FolderStore) -> Mapping[str, Tensor]:
        """Return embedding and head on their grids, and as `BLOCKS` their bytes."""
        types = self.types(store)["types"]

        def make() -> Mapping[str, Tensor]:
            with store.scratch(0) as record:
                return self._quantized(types, self._ends(self._fisher(record), record))

        return store.tensors_once(ENDS, make)

    def _fisher(self, record: Callable[[], Recorded]) -> Fisher:
        return loss_fisher(self.model, self.calibration[:GRADIENTS], self.batch_size, record)

    def _found(self, store: FolderStore) -> dict[str, Any]:
        with store.scratch(0) as record:
            fisher = self._fisher(record)
            ends = self._ends(fisher, record)
            grids = Quantized(DENSE, AnyBlock()).ladder(0, 0)
            surveyed = survey(self.model, self._batches, 0, grids, fisher.outputs, record=record)
        fits = {name: sizes for names, sizes in self.units.items() for name in names}
        costs = {unit.name: {str(p.grid): cost for p, cost in unit.costs.items()} for unit in surveyed}
        costs |= {name: end.costs(fits[name]) for name, end in ends.items()}
        units = list(self.units.items())
        options = [
            [(n, sum(costs[name][kind] for name in names)) for kind, n in sizes.items()] for names, sizes in units
        ]
        chosen, bound = choose(options, self.room)
        cost = sum(unit[k][1] for unit, k in zip(options, chosen, strict=True))
        types = {name: list(sizes)[k] for (names, sizes), k in zip(units, chosen, strict=True) for name in names}
        store.tensors_once(ENDS, lambda: self._quantized(types, ends))
        return {"types": types, "cost": cost, "gap": max(0.0, cost - bound)}

    @property
    def _batches(self) -> list[Tensor]:
        return list(self.calibration[:WINDOWS].split(self.batch_size))

    def _quantized(self, types: Mapping[str, str], ends: Mapping[str, End]) -> dict[str, Tensor]:
        step, found = begin("embedding and head", len(ends)), dict[str, Tensor]()
        for name, end in ends.items():
            found[f"{name}.weight"], found[f"{BLOCKS}{name}"] = end.quantized(types[name], self.quantizer)
            step(name)
        return found

    @torch.no_grad()
    def _ends(self, fisher: Fisher, record: Callable[[], Recorded]) -> dict[str, End]:
        """Return embedding and head, with what judges them on the calibration windows."""
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


def on_grid(name: str) -> Constraint:
    """Return the constraint of all weights on the grid of a name."""
    return Quantized(DENSE, make_grid(name, BLOCK))
