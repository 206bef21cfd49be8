"""A checkpoint that is never whole in memory: weights of one decoder layer, and assembly of the pruned checkpoint."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convexprune._layerwise.model import DecoderLayer
from convexprune._storage.checkpoint import INDEX, WEIGHTS, read_index
from convexprune._storage.failures import reading
from convexprune._storage.files import Stamp, copy_file, has_changed, require_unchanged, sha256, write_settings
from convexprune._storage.tensors import Entry, cast, entries, raw, scanned, write_tensors
from convexprune.errors import ModelError

from .._discovery.family import refuse_more_layers
from .admission import refuse_non_finite, refuse_other_codes
from .model_folder import CONFIG, NotStreamable, companions, result_name, shard_files
from .origin import Origin

logger = logging.getLogger(__name__)

Configured = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Makes settings of a model out of those of another."""
Renamed = Callable[[str], str | None]
"""Gives the name of a tensor in another model; None if that has no such tensor."""


class Shards:
    """The safetensors shards of a folder, and a model on the meta device whose parameters they fill on demand."""

    def __init__(
        self, folder: Path, model: PreTrainedModel, device: torch.device | str, inside: str, trusted: bool = False
    ) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self.dtype = model.dtype
        self.files = shard_files(folder)
        self.trusted = trusted
        companions(folder, trusted)
        self._stamps = {path: Stamp.of(path) for path in (folder / CONFIG, *self.files)}
        self._metadata: dict[Path, dict[str, str]] = {}
        self._stored: dict[str, Entry] = {}
        for path in self.files:
            found, self._metadata[path] = entries(path)
            self._stored |= found
        self._names = stored_names(model, self._stored, inside)
        self._weights = {self._names[name] for name, _ in model.named_parameters() if name in self._names}
        refuse_other_codes({name: self._stored[name].spec.code for name in sorted(self._weights)})
        self._fill_fixed(model, inside)

    def origin(self) -> Origin:
        """Return the sha256 and the stamp of every file that decides the result, by name; reads all files."""
        found = {CONFIG: str(sha256(self.folder / CONFIG))}
        found |= {self._name(path): scanned(path, self._weights) for path in self.files}
        found |= {self._name(path): str(sha256(path)) for path in companions(self.folder, self.trusted)}
        self.require_unchanged()
        return Origin(found, {self._name(path): stamp for path, stamp in self._stamps.items()})

    def require_same(self, origin: Origin) -> None:
        """Check that the files are those of another process; only files with new stamps are read."""
        for path, stamp in self._stamps.items():
            name = self._name(path)
            if stamp != origin.stamps.get(name) and sha256(path) != origin.checksums.get(name):
                raise has_changed(path)
        self.require_unchanged()

    def require_unchanged(self, paths: Iterable[Path] | None = None) -> None:
        """Check that some or all files have not been written to or replaced since they were opened."""
        require_unchanged(self._stamps if paths is None else {path: self._stamps[path] for path in paths})

    @contextmanager
    def resident(self, layer: DecoderLayer) -> Iterator[None]:
        away = layer.module.state_dict()
        here = {name: self._read(f"{layer.name}.{name}", tensor) for name, tensor in away.items()}
        self.require_unchanged({self._stored[self._names[f"{layer.name}.{name}"]].path for name in away})
        layer.module.load_state_dict(here, assign=True)
        del here
        try:
            refuse_non_finite(layer.module, f"{layer.name}.")
            yield
        finally:
            layer.module.load_state_dict(away, assign=True)

    def entry(self, name: str) -> Entry | None:
        """Return the place of a tensor; None for a tensor that is tied and not stored."""
        return self._stored[self._names[name]] if name in self._names else None

    def prefetch(self, layer: DecoderLayer) -> None:
        for name in layer.module.state_dict():
            self._stored[self._names[f"{layer.name}.{name}"]].prefetch()

    def assemble(
        self, target: Path, pruned: Mapping[str, Entry], configured: Configured = dict, renamed: Renamed = str
    ) -> None:
        """Write the checkpoint in the model's dtype, tensor by tensor, with some replaced; config.json comes last."""
        self.require_unchanged()
        replaced = {self._names[name]: entry for name, entry in pruned.items()}
        places = self._places(renamed)
        files = [path for path in self.files if any(self._stored[stored].path == path for stored in places)]
        total = sum(self._write_shard(path, target / self._name(path), replaced, places) for path in files)
        self._copy_companions(target)
        if self.files != [self.folder / WEIGHTS]:
            index = read_index(self.folder)
            index["metadata"] = index.get("metadata", {}) | {"total_size": total}
            index["weight_map"] = {places[n]: file for n, file in index["weight_map"].items() if n in places}
            write_settings(target / INDEX, index)
        config = configured(self._settings(self.folder / CONFIG))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(self.dtype).removeprefix("torch.")
        self.require_unchanged()
        write_settings(target / CONFIG, config)

    def require_assembled(self, folder: Path, pruned: Mapping[str, Entry], renamed: Renamed = str) -> None:
        """Check that `assemble` has written the requested tensors, bit for bit."""
        replaced = {self._names[name]: entry for name, entry in pruned.items()}
        found = {name: entry for path in shard_files(folder) for name, entry in entries(path)[0].items()}
        places = self._places(renamed)
        if others := found.keys() ^ set(places.values()):
            raise ModelError(f"{folder}: {min(others)} is missing, or should not be there.")
        for stored, name in places.items():
            spec, read = cast(replaced.get(stored, self._stored[stored]), self.dtype)
            if found[name].spec != spec:
                raise ModelError(f"{folder}: {name} should be {spec} and is {found[name].spec}.")
            expected = read()
            if found[name].read_bytes() != (raw(expected) if isinstance(expected, Tensor) else expected):
                raise ModelError(f"{folder}: {name} has other values than it should have.")

    def _places(self, renamed: Renamed) -> dict[str, str]:
        """Return the stored names in the result, by stored name."""
        named, places = {stored: name for name, stored in self._names.items()}, dict[str, str]()
        for stored in self._stored:
            name = named.get(stored, stored)
            if (new := renamed(name)) is not None:
                places[stored] = stored if new == name else stored_as(stored, name, new)
        return places

    def _write_shard(self, path: Path, target: Path, replaced: Mapping[str, Entry], places: Mapping[str, str]) -> int:
        here = {n: new for n, new in places.items() if self._stored[n].path == path}
        casts = {new: cast(replaced.get(n, self._stored[n]), self.dtype) for n, new in here.items()}
        specs = {n: spec for n, (spec, _) in casts.items()}
        write_tensors(target, specs, lambda n: casts[n][1](), self._metadata[path])
        return sum(spec.nbytes for spec in specs.values())

    def _copy_companions(self, target: Path) -> None:
        for path in companions(self.folder, self.trusted):
            name = result_name(path.name)
            if not self.trusted and path.suffix == ".json" and b'"auto_map"' in path.read_bytes():
                write_settings(target / name, self._settings(path))
            else:
                copy_file(path, target / name)

    def _settings(self, path: Path) -> Any:
        """Return the content of a JSON file, without places of code that was not trusted and is not copied."""
        with reading(path):
            value = json.loads(path.read_bytes())
        if not self.trusted and isinstance(value, dict) and value.pop("auto_map", None):
            logger.warning("%s: auto_map is left out, because its code was not trusted", path)
        return value

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _read(self, name: str, like: Tensor) -> Tensor:
        return self._stored[self._names[name]].read().to(self.device, like.dtype)

    @torch.no_grad()
    def _fill_fixed(self, model: PreTrainedModel, inside: str) -> None:
        outside = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{inside}.")}
        for name, tensor in outside.items():
            if name in self._names:
                module, _, last = name.rpartition(".")
                model.get_submodule(module).load_state_dict({last: self._read(name, tensor)}, strict=False, assign=True)
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(self.device), name not in module._non_persistent_buffers_set)
        for name, parameter in model.named_parameters():
            if parameter.is_meta and not name.startswith(f"{inside}."):
                raise NotStreamable(f"nothing fills {name}")
        refuse_non_finite(model, "")


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
    """Return stored names by the model's, without tied tensors, with the prefix that a headless checkpoint lacks."""
    prefix, renamed = f"{model.base_model_prefix}.", _renamed(model, stored)
    refuse_more_layers(model, renamed)
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
            one, other = stored[alias], stored[names[twin]]
            are_equal = one is other or (one.spec == other.spec and one.read_bytes() == other.read_bytes())
            if twin != name and (name.startswith(f"{inside}.") or not are_equal):
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
