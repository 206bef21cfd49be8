"""Write a model with reordered channels; tensors of a streamed model change only while they are copied."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from convexprune._storage.tensors import DTYPES, Entry

from .._channels.channels import Axis
from .._channels.permuting import Permutation
from .._huggingface import HuggingFaceModel
from .saving import save_new


@dataclass(frozen=True)
class _PermutedEntry(Entry):
    """A tensor in a file, with reordered entries along some axes."""

    orders: tuple[tuple[Axis, list[int]], ...] = ()

    def read_bytes(self) -> bytearray:
        data = super().read_bytes()
        tensor = torch.frombuffer(data, dtype=DTYPES[self.spec.code]).reshape(self.spec.shape)
        for axis, order in self.orders:
            axis.order(tensor, torch.tensor(order))
        return data


def save_permuted(model: HuggingFaceModel, found: Permutation, folder: Path) -> None:
    """Write a model in its new order, and `permutation.json`, as a folder that appears whole or not at all.

    A streamed model is written tensor by tensor; the channels of a model in memory are reordered.
    """
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
                changed[name] = _PermutedEntry(entry.path, entry.spec, entry.begin, tuple(orders[own]))
    save_new(model, folder, changed, {"permutation.json": found.to_dict()})
