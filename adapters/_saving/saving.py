"""Write a model as a folder for transformers: tensor by tensor if streamed, else whole; pruned, or reordered."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune._layerwise.folder_store import ENDS, FolderStore
from convexprune._layerwise.store import BLOCKS
from convexprune._storage.failures import writing
from convexprune._storage.files import copy_file, write_json, write_settings
from convexprune._storage.staging import Staging
from convexprune._storage.tensors import ChangedEntry, Entry

from .._channels.channels import Axis
from .._channels.permuting import Permutation
from .._checkpoints.model_folder import CONFIG, documents, result_name
from .._discovery.operators import offloaded, tensor_of
from .._huggingface import HuggingFaceModel
from .._removal.base import AbstractRemoval

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
    whole = {name: tensor_of(inner, name) for name in inner.state_dict()} if _is_offloaded(inner) else None
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


def save_new(model: HuggingFaceModel, folder: Path, changed: Mapping[str, Entry], notes: Mapping[str, Any]) -> None:
    """Write a model as a folder that appears whole or not at all; tensors of a streamed model may be `changed`."""
    with Staging(folder).whole() as whole:
        if model.shards is None:
            save(model, whole)
        else:
            model.shards.assemble(whole, changed)
        for name, value in notes.items():
            write_json(whole / name, value)


def save_from_store(
    model: HuggingFaceModel,
    store: FolderStore,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Mapping[str, Any],
    narrowed: AbstractRemoval | None = None,
) -> None:
    """Write the model with its layers from the store, without removed parts, and add `settings` to config.json.

    A streamed model is assembled tensor by tensor; a loaded model has the layers already. A `tokenizer` replaces the
    checkpoint's.
    """
    ends = {name: entry for name, entry in store.kept(ENDS).items() if not name.startswith(BLOCKS)}
    if model.shards is None:
        for name, entry in ends.items():
            model.model.get_parameter(name).data.copy_(entry.read())
        with writing(folder):
            save(model if narrowed is None else narrowed.apply_to(model), folder)
        write_settings(folder / CONFIG, json.loads((folder / CONFIG).read_bytes()) | dict(settings))
        for path in [] if model.folder is None else documents(model.folder):
            copy_file(path, folder / result_name(path.name))
        return

    def configured(config: Mapping[str, Any]) -> dict[str, Any]:
        return (dict(config) if narrowed is None else narrowed.configured(config)) | dict(settings)

    renamed = str if narrowed is None else narrowed.renamed
    model.shards.assemble(folder, pruned_entries(model, store, narrowed) | ends, configured, renamed)
    if tokenizer is not None:
        with writing(folder):
            tokenizer.save_pretrained(folder)


def pruned_entries(
    model: HuggingFaceModel, store: FolderStore, narrowed: AbstractRemoval | None = None
) -> dict[str, Entry]:
    layers = enumerate(model.layers)
    found = {f"{layer.name}.{name}": e for i, layer in layers for name, e in store.entries(i).items()}
    return found if narrowed is None else narrowed.entries(found)


def _is_offloaded(model: PreTrainedModel) -> bool:
    return any(offloaded(module) is not None for module in model.modules())


def _reordered(orders: Iterable[tuple[Axis, list[int]]], tensor: Tensor) -> Tensor:
    for axis, order in orders:
        axis.order(tensor, torch.tensor(order))
    return tensor


def save_permuted(model: HuggingFaceModel, found: Permutation, folder: Path) -> None:
    """Write a model in its new order, and `permutation.json`; a streamed model is written tensor by tensor."""
    changed = {}
    if model.shards is None:
        found.apply(model.model)
    else:
        orders = defaultdict[str, list[tuple[Axis, list[int]]]](list)
        for one in found.permuted:
            for axis in (*one.channels.axes, *one.channels.consumers):
                orders[axis.parameter].append((axis, one.order))
        named = dict[int, str]()  # a tensor that is tied to another may be stored twice
        for name, parameter in model.model.named_parameters(remove_duplicate=False):
            own, entry = named.setdefault(id(parameter), name), model.shards.entry(name)
            if own in orders and entry is not None:
                change = partial(_reordered, orders[own])
                changed[name] = ChangedEntry(entry.path, entry.spec, entry.begin, entry, change)
    save_new(model, folder, changed, {"permutation.json": found.to_dict()})
