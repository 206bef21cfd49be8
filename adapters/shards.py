"""A checkpoint that is never whole in memory: one decoder layer's weights at a time, and the pruned one assembled."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel

from convexprune.errors import ModelError
from convexprune.model import DecoderLayer
from convexprune.pipeline.files import appearing, sha256, write, writing
from convexprune.pipeline.tensors import CODES, DTYPES, Entry, Spec, entries, write_tensors

from .admission import refuse_non_finite

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is not copied to the result: weights, which are written anew, or would be the dense ones in another format; and
# what is said of the dense model.
NOT_COPIED = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", "README.md",
)  # fmt: skip


class NotStreamable(Exception):
    """Why a checkpoint has to be loaded whole."""


class Shards:
    """The safetensors shards of a folder, and a model whose parameters on the meta device they fill when asked.

    Raises:
        NotStreamable: the tensors of the folder are not, one by one and as they are, those of the model.
        ModelError: a shard is damaged.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, device: torch.device | str, inside: str) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self.dtype = model.dtype
        self.files = shard_files(folder)
        self._metadata: dict[Path, dict[str, str]] = {}
        self._stored: dict[str, Entry] = {}
        for path in self.files:
            found, self._metadata[path] = entries(path)
            self._stored |= found
        self._names = _names(model, self._stored, inside)
        self._fill_fixed(model, inside)

    def checksums(self) -> dict[str, str]:
        """The sha256 of every file that decides what the model is."""
        return {path.name: str(sha256(path)) for path in (self.folder / "config.json", *self.files)}

    @contextmanager
    def resident(self, layer: DecoderLayer) -> Iterator[None]:
        """Inside, the weights of `layer` are in memory, as they are in the shards.

        Raises:
            ModelError: a weight is not finite or cannot be read.
        """
        away = layer.module.state_dict()
        here = {name: self._read(f"{layer.name}.{name}", tensor) for name, tensor in away.items()}
        layer.module.load_state_dict(here, assign=True)
        del here
        try:
            refuse_non_finite(layer.module, f"{layer.name}.")
            yield
        finally:
            layer.module.load_state_dict(away, assign=True)

    def entry(self, name: str) -> Entry | None:
        """Where a tensor of the model is stored; None if it is not, but tied to one that is."""
        return self._stored[self._names[name]] if name in self._names else None

    def prefetch(self, layer: DecoderLayer) -> None:
        """Have the disk read the weights of `layer` while something else is computed."""
        for name in layer.module.state_dict():
            self._stored[self._names[f"{layer.name}.{name}"]].prefetch()

    def assemble(self, target: Path, pruned: Mapping[str, Entry]) -> None:
        """Write the checkpoint with some tensors replaced, shard by shard and tensor by tensor; config.json comes last.

        `pruned` are by the names of the model. All else is copied, in the dtype of the model.

        Raises:
            OutputError: the disk is full or fails.
        """
        replaced = {self._names[name]: entry for name, entry in pruned.items()}
        total = 0
        for path in self.files:
            sources = {n: replaced.get(n, entry) for n, entry in self._stored.items() if entry.path == path}
            casts = {n: self._cast(entry) for n, entry in sources.items()}
            specs = {n: casts[n][0] for n in sources}
            write_tensors(target / path.name, specs, lambda n, casts=casts: casts[n][1](), self._metadata[path])
            total += sum(spec.nbytes for spec in specs.values())
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(NOT_COPIED):
                with writing(target):
                    shutil.copyfile(path, target / path.name)
        if (self.folder / INDEX).is_file():
            index = json.loads((self.folder / INDEX).read_text())
            index["metadata"] = index.get("metadata", {}) | {"total_size": total}
            _write_text(target / INDEX, index)
        config = json.loads((self.folder / "config.json").read_text())
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(self.dtype).removeprefix("torch.")
        _write_text(target / "config.json", config)

    def written_to(self, folder: Path) -> "Shards":
        """The same tensors as `assemble` has written them to `folder`.

        Raises:
            ModelError: a tensor is missing, is not of the source, or has another shape or type.
        """
        other = copy(self)
        other.files, other._stored = shard_files(folder), {}
        for path in other.files:
            other._stored |= entries(path)[0]
        expected = {name: self._cast(entry)[0] for name, entry in self._stored.items()}
        found = {name: entry.spec for name, entry in other._stored.items()}
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                raise ModelError(f"{folder}: {name} should be {expected.get(name)} and is {found.get(name)}.")
        return other

    def _cast(self, entry: Entry) -> tuple[Spec, Callable[[], Tensor | bytearray]]:
        """What is to be written of a tensor, and how to get it."""
        stored = DTYPES.get(entry.spec.code)
        if stored is None or not stored.is_floating_point or stored == self.dtype:
            return entry.spec, entry.read_bytes
        elements = entry.spec.nbytes // stored.itemsize
        spec = Spec(CODES[self.dtype], entry.spec.shape, elements * self.dtype.itemsize)
        return spec, lambda: entry.read().to(self.dtype)

    def _read(self, name: str, like: Tensor) -> Tensor:
        return self._stored[self._names[name]].read().to(self.device, like.dtype)

    @torch.no_grad()
    def _fill_fixed(self, model: PreTrainedModel, inside: str) -> None:
        """Load all that is outside of the decoder layers."""
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


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, as transformers chooses them.

    Raises:
        NotStreamable: there are none.
        ModelError: a shard that the index names is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise NotStreamable(f"there is no {WEIGHTS} and no {INDEX}")
    files = sorted({folder / name for name in json.loads((folder / INDEX).read_text())["weight_map"].values()})
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(f"{folder}: {INDEX} names {', '.join(missing)}, which is missing. Download it again.")
    return files


def local_folder(source: str, revision: str) -> Path:
    """The folder itself, or the local snapshot of a name on the hub, downloaded if need be."""
    if Path(source).is_dir():
        return Path(source)
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of the first floating-point tensor, for a config that names none.

    Raises:
        NotStreamable: there is none.
    """
    found = (DTYPES.get(e.spec.code) for path in shard_files(folder) for e in entries(path)[0].values())
    dtype = next((d for d in found if d is not None and d.is_floating_point), None)
    if dtype is None:
        raise NotStreamable("it stores no floating-point tensor")
    return dtype


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, modules that are built get parameters without memory; their buffers are computed as always.

    Buffers that no checkpoint holds, as the tables of rotary embeddings, are thereby right.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _renamed(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """The stored name by the name that transformers gives it while it loads; tensors that it changes are refused."""
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


def _names(model: PreTrainedModel, stored: Mapping[str, Entry], inside: str) -> dict[str, str]:
    """The stored name of every tensor of the model but those that are tied to another.

    Checkpoints of the model without its head lack the prefix that its tensors have with it.
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


def _equal(one: Entry, other: Entry) -> bool:
    return one.spec == other.spec and one.read_bytes() == other.read_bytes()


def _write_text(path: Path, value: Any) -> None:
    with appearing(path) as file:
        write(file, (json.dumps(value, indent=2) + "\n").encode())
