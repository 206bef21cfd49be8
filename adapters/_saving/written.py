"""Check the result of a run by opening it before the base model is released: every tensor, every zero."""

import json
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._storage.tensors import Entry, Spec, entries
from convexprune.errors import ModelError, OutputError
from convexprune.report import OperatorReport

from .._checkpoints.model_folder import CONFIG, shard_files
from .._discovery.operators import tensor_of
from .._huggingface import HuggingFaceModel
from .._removal.base import AbstractRemoval
from .saving import pruned_entries


def require_written(
    model: HuggingFaceModel,
    folder: Path,
    reports: Sequence[OperatorReport],
    store: FolderStore | None = None,
    narrowed: AbstractRemoval | None = None,
) -> None:
    """Check names, shapes, dtypes and reported zeros of the result; of a smaller model, every bit."""
    try:
        if narrowed is not None:
            assert store is not None
            _require_narrowed(model, folder, store, narrowed)
            return
        written = model
        if model.shards is not None:
            written = copy(model)
            written.shards = model.shards.written_to(folder)
        for fault in miscounted(written, reports).values():
            raise ModelError(fault)
        if model.shards is None:
            _require_equal(model, folder)
    except ModelError as cause:
        raise OutputError(
            f"{folder}: what was written is not the pruned model: {cause} What is finished is kept: mend the disk, "
            "then go on with resume=True (--resume)."
        ) from cause


def _require_narrowed(model: HuggingFaceModel, folder: Path, store: FolderStore, narrowed: AbstractRemoval) -> None:
    """Check the tensors of a folder, and that the configuration describes a model of this size."""
    if model.shards is None:
        _require_equal(narrowed.apply_to(model), folder)
    else:
        model.shards.require_assembled(folder, pruned_entries(model, store, narrowed), narrowed.renamed)
    narrowed.require_configured(model, json.loads((folder / CONFIG).read_bytes()))


def miscounted(model: HuggingFaceModel, reports: Sequence[OperatorReport]) -> dict[str, str]:
    said, wrong = {report.name: report.zeros for report in reports}, dict[str, str]()

    def count(context: LayerContext) -> None:
        for operator in context.layer.operators:
            name, zeros = f"{context.layer.name}.{operator.name}", _zeros(operator.read())
            if zeros != said.get(name):
                wrong[name] = f"{name}: it has {zeros} zeros, and the report says {said.get(name)}."

    LayerWalk(model, (), MemoryStore(range(len(model.layers))), streams=()).run(count)
    return wrong


def _require_equal(model: HuggingFaceModel, folder: Path) -> None:
    """Compare the tensors of a folder with memory; those under new names, as of split experts, as a set."""
    found = {name: entry for path in shard_files(folder) for name, entry in entries(path)[0].items()}
    names = model.model.state_dict().keys()
    for name in found.keys() & names:
        here, there = _summary(tensor_of(model.model, name)), _summary(found[name])
        if here != there:
            raise ModelError(f"{name} should be {here} and is {there}.")
    parameters = dict(model.model.named_parameters(remove_duplicate=False))
    places = {name: _place(model.model, parameter) for name, parameter in parameters.items()}
    once = {place: name for name, place in places.items()}
    stored = {place for name, place in places.items() if name in found}
    here = _totals(tensor_of(model.model, name) for place, name in once.items() if place not in stored)
    there = _totals(entry.read() for name, entry in found.items() if name not in names)
    if here != there:
        raise ModelError(f"{here[0]} other numbers, {here[1]} of them 0, are {there[0]}, {there[1]} of them 0.")


def _place(model: PreTrainedModel, parameter: Tensor) -> int:
    """Return an address that tied tensors share; the configuration tells that an offloaded head is tied."""
    if not parameter.is_meta:
        return parameter.untyped_storage().data_ptr()
    head: Any = model.get_output_embeddings()
    if head is not None and parameter is head.weight and model.config.get_text_config().tie_word_embeddings:
        return id(cast(Any, model.get_input_embeddings()).weight)
    return id(parameter)


def _summary(tensor: Tensor | Entry) -> tuple[Spec, int]:
    if isinstance(tensor, Entry):
        return tensor.spec, _zeros(tensor.read())
    return Spec.of(tensor), _zeros(tensor)


def _zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def _totals(tensors: Iterable[Tensor]) -> tuple[int, int]:
    counts = [(tensor.numel(), _zeros(tensor)) for tensor in tensors]
    return sum(numbers for numbers, _ in counts), sum(zeros for _, zeros in counts)
