"""A caller's model: its origin as checksums, its state, which is restored after a run, and its single user."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from convexprune._runs.folder import checksum
from convexprune._storage.files import Stamp
from convexprune.errors import ModelError, shown

from .._discovery.operators import tensor_of

OF_SAVING = {"_name_or_path", "architectures", "dtype", "torch_dtype"}
"""Settings of a model that come and go as it is read and saved."""
OF_LAST_CALL = {"padding", "truncation", "is_local", "local_files_only"}
"""Settings of a tokenizer that its last call left, or that say where it was read."""


class Origin(NamedTuple):
    """The source of a model."""

    checksums: Mapping[str, str]  # by name: of files; for a loaded model, of tensors, settings and tokenizer
    stamps: Mapping[str, Stamp]  # of the files of a streamed model


def origin_of_loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Origin:
    found = {name: checksum(tensor_of(model, name)) for name in model.state_dict()}
    found["configuration"] = _of_settings(model.config)
    if (generation := getattr(model, "generation_config", None)) is not None:
        found["generation settings"] = _of_settings(generation)
    if tokenizer is not None:
        found["tokenizer"] = _of_tokenizer(tokenizer)
    return Origin(found, {})


def _of_settings(config: PretrainedConfig | GenerationConfig) -> str:
    def kept(part: dict[str, Any]) -> dict[str, Any]:  # a wrapper's configuration holds others
        return {name: value for name, value in part.items() if name not in OF_SAVING}

    return _checksum(json.loads(config.to_json_string(use_diff=False), object_hook=kept))


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the checksum of the tokenizer's saved files: a slow tokenizer is more than its vocabulary."""
    with TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as cause:  # whatever the code of a tokenizer raises
            raise ModelError(
                f"The {type(tokenizer).__name__} cannot be saved with the result ({type(cause).__name__}: "
                f"{shown(str(cause))}). Give another tokenizer, or none and token ids to calibrate on."
            ) from cause
        files = {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    found: dict[str, Any] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name in {"tokenizer.json", "tokenizer_config.json"} & files.keys():
        found[name] = {key: value for key, value in json.loads(files[name]).items() if key not in OF_LAST_CALL}
    return _checksum(found)


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_lock = threading.Lock()
_users: dict[int, list[int]] = {}  # by the model: its thread, once for each use inside of another


@contextmanager
def used_alone(model: nn.Module) -> Iterator[None]:
    """Refuse a model that another thread uses: two runs would disturb each other's hooks and weights."""
    thread = threading.get_ident()
    with _lock:
        users = _users.setdefault(id(model), [])
        if users and users[0] != thread:
            raise ModelError(
                f"This {type(model).__name__} is in use by another thread of this process. Give each thread a model of "
                "its own (copy.deepcopy), or wait."
            )
        users.append(thread)
    try:
        yield
    finally:
        with _lock:
            users.pop()
            if not users:
                del _users[id(model)]


@contextmanager
def cast_back(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Give a loaded model back, if the block raises, what a cast to `dtype` rounds: parameters, gradients, buffers."""

    def kept(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and dtype not in (None, tensor.dtype) and not tensor.is_meta

    is_loaded = isinstance(model, PreTrainedModel)
    own = [each for p in model.parameters() for each in (p, p.grad) if each is not None] if is_loaded else []
    named = dict(model.named_buffers(remove_duplicate=False)) if is_loaded else {}  # a cast makes new ones
    before = [(each, each.data.to("cpu")) for each in own if kept(each)]
    buffers = {name: buffer.to("cpu") for name, buffer in named.items() if kept(buffer)}

    def put_back() -> None:
        for tensor, values in (*before, *((model.get_buffer(name), values) for name, values in buffers.items())):
            tensor.data = values.to(tensor.device)

    with ExitStack() as failed:
        failed.callback(put_back)
        yield
        failed.pop_all()


class OriginalState:
    """The state of a `model` before a run; compiled modules, which call no hooks, run as written until then."""

    def __init__(self, model: nn.Module) -> None:
        self._training = [module for module in model.modules() if module.training]
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.layers: dict[str, dict[str, Tensor]] = {}
        self._compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
        for module in self._compiled:
            module._compiled_call_impl = None

    def keep(self, name: str, state: Mapping[str, Tensor]) -> None:
        if name not in self.layers:
            self.layers[name] = {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}

    def restore(self) -> None:
        """Restore modes, compiled modules, and parameters that ask for gradients; no layer is kept any longer."""
        self.layers = {}
        for module, compiled in self._compiled.items():
            module._compiled_call_impl = compiled
        for module in self._training:
            module.training = True
        for parameter in self._learning:
            parameter.requires_grad_()
