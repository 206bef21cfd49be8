"""Map stored tensors to tensors of the model, where transformers only renames them on loading."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from convexprune._storage.tensors import Entry
from convexprune.errors import ModelError

from .model_folder import NotStreamable


def _renamed(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Return stored names by the name after loading; tensors that loading changes are refused."""
    if model.dtype in (torch.float16, torch.bfloat16) and (
        model._keep_in_fp32_modules or getattr(model, "_keep_in_fp32_modules_strict", None)
    ):
        raise NotStreamable("some of its modules are kept in float32")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # before transformers 5 nothing was converted
        return {key: key for key in keys}
    transforms, names = get_model_conversion_mapping(model), {}
    for key in keys:
        name = key
        for transform in transforms:
            renamed, matched = transform.rename_source_key(name)
            if isinstance(transform, WeightConverter) and matched is not None:
                raise NotStreamable(f"transformers converts {key} while it loads")
            name = renamed
        names[name] = key
    return names


def stored_names(model: PreTrainedModel, stored: Mapping[str, Entry], inside: str) -> dict[str, str]:
    """Return the stored name of every tensor of the model without tied tensors.

    Checkpoints of a model without its head lack the prefix of the tensors.
    """
    prefix, renamed = f"{model.base_model_prefix}.", _renamed(model, stored)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[str, str] = {}
    filled: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        known = next((a for a in (name, name.removeprefix(prefix), prefix + name) if a in renamed), None)
        if known is not None:
            alias = renamed[known]
            if stored[alias].spec.shape != tuple(tensor.shape):
                raise NotStreamable(f"{alias} is {list(stored[alias].spec.shape)}, the model's {list(tensor.shape)}")
            names[name] = alias
            twin = filled.setdefault(id(parameters.get(name, tensor)), name)
            if twin != name and (name.startswith(f"{inside}.") or not _equal(stored[alias], stored[names[twin]])):
                raise NotStreamable(f"{name} and {twin} are tied, but stored apart")
    for name, tensor in model.state_dict().items():
        if name not in names and (id(parameters.get(name, tensor)) not in filled or name.startswith(f"{inside}.")):
            raise NotStreamable(f"the checkpoint has no {name}")
    return names


def stored_as(stored: str, name: str, new: str) -> str:
    """Return the stored name of a tensor in a model where its layer has a new number."""
    parts = zip(name.split("."), new.split("."), strict=True)
    (at,) = [number for number, (old, now) in enumerate(parts) if old != now]
    (before, old), now = name.split(".")[at - 1 : at + 1], new.split(".")[at]
    found = f".{stored}".split(f".{before}.{old}.")
    if len(found) != 2:
        raise ModelError(f"The checkpoint stores {name} as {stored}, from which the number of its layer is not clear.")
    return f".{before}.{now}.".join(found).removeprefix(".")


def _equal(one: Entry, other: Entry) -> bool:
    return one.spec == other.spec and one.read_bytes() == other.read_bytes()
