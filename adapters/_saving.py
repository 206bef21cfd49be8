"""Write a model as a folder for transformers, tensor by tensor if streamed, and check the folder of a run."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.folder_store import ENDS, FolderStore
from convexprune._layerwise.store import BLOCKS, MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._storage.failures import writing
from convexprune._storage.files import copy_file, write_json, write_settings
from convexprune._storage.staging import Staging
from convexprune._storage.tensors import ChangedEntry, Entry, entries
from convexprune.errors import ModelError, OutputError
from convexprune.report import OperatorReport

from ._channels.channels import Axis
from ._channels.permuting import Permutation
from ._checkpoints.model_folder import CONFIG, documents, result_name, shard_files
from ._checkpoints.shards import Shards
from ._discovery.operators import offloaded, tensor_of
from ._huggingface import HuggingFaceModel
from ._removal.base import AbstractRemoval, settings_in

logger = logging.getLogger(__name__)


def save(model: HuggingFaceModel, folder: str | Path) -> None:
    """Write a model, and its tokenizer, if any, as a new folder for transformers."""
    inner = model.model
    # What reading a GGUF file leaves behind makes transformers refuse to save weights that are ordinary by now.
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in vars(inner):
            delattr(inner, attribute)
    if "quantization_config" in vars(inner.config):
        delattr(inner.config, "quantization_config")
    # What is offloaded is on the meta device in the model's own state.
    is_offloaded = any(offloaded(module) is not None for module in inner.modules())
    whole = {name: tensor_of(inner, name) for name in inner.state_dict()} if is_offloaded else None
    with _valid_generation(inner, model.name):
        inner.save_pretrained(folder, state_dict=whole)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


@contextmanager
def _valid_generation(model: Any, name: str) -> Iterator[None]:
    """Repair generation settings that cannot be saved, such as a temperature without sampling, during the context."""
    own = model.generation_config
    if own is not None:
        try:
            own.validate(strict=True)
        except ValueError as cause:
            logger.warning("The generation settings of %s cannot be saved as they are: %s", name, cause)
            model.generation_config = deepcopy(own)
            model.generation_config.do_sample = True
    try:
        yield
    finally:
        model.generation_config = own


def save_from_store(
    model: HuggingFaceModel,
    store: FolderStore,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    marked: Callable[[Mapping[str, Any]], dict[str, Any]],
    narrowed: AbstractRemoval | None = None,
) -> None:
    """Write the model with its layers from the store, without removed parts, and with the config.json as `marked`.

    A streamed model is assembled tensor by tensor; a loaded model has the layers already. A `tokenizer` replaces the
    checkpoint's.
    """
    if model.shards is None:
        for name, entry in _ends(store).items():
            model.model.get_parameter(name).data.copy_(entry.read())
        with writing(folder):
            save(model if narrowed is None else narrowed.apply_to(model), folder)
        write_settings(folder / CONFIG, marked(json.loads((folder / CONFIG).read_bytes())))
        for path in [] if model.folder is None else documents(model.folder):
            copy_file(path, folder / result_name(path.name))
        return

    def configured(config: Mapping[str, Any]) -> dict[str, Any]:
        return marked(config if narrowed is None else narrowed.configured(config))

    renamed = str if narrowed is None else narrowed.renamed
    model.shards.assemble(folder, _changed_entries(model, store, narrowed), configured, renamed)
    if tokenizer is not None:
        with writing(folder):
            tokenizer.save_pretrained(folder)


def pruned_entries(model: HuggingFaceModel, store: FolderStore) -> dict[str, Entry]:
    layers = enumerate(model.layers)
    return {f"{layer.name}.{name}": e for i, layer in layers for name, e in store.entries(i).items()}


def _changed_entries(model: HuggingFaceModel, store: FolderStore, narrowed: AbstractRemoval | None) -> dict[str, Entry]:
    """Return the tensors of the result that are not the checkpoint's: of layers, and of quantized embeddings."""
    pruned = pruned_entries(model, store)
    return (pruned if narrowed is None else narrowed.entries(pruned)) | _ends(store)


def _ends(store: FolderStore) -> dict[str, Entry]:
    return {name: entry for name, entry in store.kept(ENDS).items() if not name.startswith(BLOCKS)}


def _reordered(orders: Iterable[tuple[Axis, list[int]]], tensor: Tensor) -> Tensor:
    for axis, order in orders:
        axis.order(tensor, torch.tensor(order))
    return tensor


def save_permuted(model: HuggingFaceModel, found: Permutation, folder: Path) -> None:
    """Write a model in its new order, and `permutation.json`; a streamed model is written tensor by tensor."""
    with Staging(folder).whole() as whole:
        if model.shards is None:
            found.apply(model.model)
            save(model, whole)
        else:
            model.shards.assemble(whole, _permuted(model.model, model.shards, found))
        write_json(whole / "permutation.json", found.to_dict())


def _permuted(model: PreTrainedModel, shards: Shards, found: Permutation) -> dict[str, Entry]:
    changed, orders = dict[str, Entry](), defaultdict[str, list[tuple[Axis, list[int]]]](list)
    for one in found.permuted:
        for axis in (*one.channels.axes, *one.channels.consumers):
            orders[axis.parameter].append((axis, one.order))
    named = dict[int, str]()  # a tensor that is tied to another may be stored twice
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own, entry = named.setdefault(id(parameter), name), shards.entry(name)
        if own in orders and entry is not None:
            change = partial(_reordered, orders[own])
            changed[name] = ChangedEntry(entry.path, entry.spec, entry.begin, entry, change)
    return changed


def require_written(
    model: HuggingFaceModel, folder: Path, store: FolderStore, narrowed: AbstractRemoval | None = None
) -> None:
    """Check the result of a run by opening the folder: every value, or of renamed tensors all zeros."""
    try:
        if model.shards is None:
            _require_equal(model if narrowed is None else narrowed.apply_to(model), folder)
        else:
            renamed = str if narrowed is None else narrowed.renamed
            model.shards.require_assembled(folder, _changed_entries(model, store, narrowed), renamed)
        if narrowed is not None:
            narrowed.require_configured(model, settings_in(folder))
    except ModelError as cause:
        raise OutputError(
            f"{folder}: what was written is not the pruned model: {cause} What is finished is kept: mend the disk, "
            "then go on with resume=True (--resume)."
        ) from cause


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
        here, there = tensor_of(model.model, name).cpu(), found[name].read()
        if here.dtype != there.dtype or not torch.equal(here, there):
            raise ModelError(f"{folder}: {name} has other values than it should have.")
    buffers = {name: buffer for name, buffer in model.model.named_buffers(remove_duplicate=False) if name in names}
    tensors = dict(model.model.named_parameters(remove_duplicate=False)) | buffers
    places = {name: _place(model.model, tensor) for name, tensor in tensors.items()}
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


def _zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def _totals(tensors: Iterable[Tensor]) -> tuple[int, int]:
    counts = [(tensor.numel(), _zeros(tensor)) for tensor in tensors]
    return sum(numbers for numbers, _ in counts), sum(zeros for _, zeros in counts)
