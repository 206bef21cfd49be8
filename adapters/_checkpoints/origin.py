"""The origin of a model as checksums: equal origins give equal results."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from convexprune._runs.identity import checksum
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
    """Return the present origin of a model in memory: checksums, and no stamps."""
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
