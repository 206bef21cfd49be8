"""Load a model from files. Only safetensors are read, unless the caller trusts pickles."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from convexprune._container.provenance import unchanged
from convexprune._schema.settings import BUNDLED
from convexprune._storage.files import named
from convexprune._storage.tensors import entries
from convexprune.errors import ModelError

from .._checkpoints import model_folder
from .._checkpoints.admission import refuse_left_out, refuse_other_codes, refuse_quantized, require_plain
from .._checkpoints.origin import Origin
from .._checkpoints.reading import ask, model_class, parameters_on_meta, read_tokenizer
from .._checkpoints.shards import Shards
from .._discovery.family import decoder_layers, refuse_more_layers
from .._discovery.operators import computes_on
from .._huggingface import HuggingFaceModel

EMBEDDED = Path(str(files("convexprune"))) / "data" / BUNDLED
"""The folder of the small OPT model that comes with convexprune (float16)."""
EMBEDDED_WINDOW = 256
"""The tokens that it was trained on at once."""

logger = logging.getLogger(__name__)


def bundled_if_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `settings` of a call; without a model, those of the bundled model, as trained."""
    if settings.get("model") is not None:
        return dict(settings)
    plain = {"dtype": "float32", "max_seq_length": EMBEDDED_WINDOW}
    chosen = {name: settings.get(name) or value for name, value in plain.items()}
    return {**settings, "model": EMBEDDED, **chosen}


def load(
    source: str | Path | PreTrainedModel,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    stream: bool = False,
    allow_changed: bool = False,
) -> HuggingFaceModel:
    """Load a model of Hugging Face transformers for pruning.

    A loaded model is used and moved in place, not copied; a model placed by accelerate stays in place. A folder without
    a tokenizer is accepted for calibration with token ids. With `stream`, decoder layers stay on the disk until needed,
    if the checkpoint allows streaming: safetensors with the model's tensors. Otherwise the model is loaded whole, with
    the reason in `whole_because`.
    """
    chosen: dict[str, Any] = {"targets": targets, "ignore": ignore}
    if isinstance(source, PreTrainedModel):
        refuse_quantized(source.config)
        require_plain(source)
        _move(source, device, dtype)
        return HuggingFaceModel(source, tokenizer, **chosen)
    if isinstance(source, nn.Module):
        require_plain(source)  # says what to do with a model of peft
    if not isinstance(source, str | Path):
        raise ModelError(
            f"A value of type {type(source).__name__} is no model of transformers. Accepted: a PreTrainedModel, a "
            "folder, a .gguf file, or a name on the hub."
        )
    name, place = str(source), place_at(source, allow_pickle) | {"revision": revision or "main"}
    place["trust_remote_code"] = trust_remote_code
    model, shards, because = None, None, "that was asked for"
    with unchanged_at(place, allow_changed):
        if stream:
            try:
                model, shards = _stream(name, place, dtype, device)
            except model_folder.NotStreamable as cause:
                because = str(cause)
                logger.warning("%s is loaded whole: %s", name, because)
        if model is None:
            model = _whole(name, place, dtype, device, allow_pickle)
        tokenizer = read_tokenizer(name, place) if tokenizer is None else tokenizer
    return HuggingFaceModel(model, tokenizer, name=name, shards=shards, whole_because=because, **chosen)


def unchanged_at(place: Mapping[str, Any], allow_changed: bool) -> AbstractContextManager[None]:
    """Return the context in which the files at a place must not change. A name on the hub has no files here."""
    folder = Path(place["pretrained_model_name_or_path"])
    return unchanged(folder, allow_changed, place.get("gguf_file")) if folder.is_dir() else nullcontext()


def _move(model: PreTrainedModel, device: str | torch.device, dtype: torch.dtype | None) -> None:
    """Move a loaded model in place; a model placed by accelerate stays in place."""
    if all(computes_on(module) is None for module in model.modules()):
        model.to(device=device, dtype=dtype)  # pyright: ignore[reportCallIssue]
    elif dtype not in (None, model.dtype):
        raise ModelError(
            f"accelerate has placed the model, so it keeps its dtype, {model.dtype}. "
            f"Load it as {dtype}, or leave dtype out."
        )


def _whole(
    name: str, place: dict[str, Any], dtype: torch.dtype | None, device: str | torch.device, allow_pickle: bool
) -> PreTrainedModel:
    model = read_model(name, place, dtype, allow_pickle)
    if "gguf_file" in place:
        logger.warning("%s: its blocks were unpacked to %s; what is saved is an ordinary folder.", name, model.dtype)
    require_plain(model)
    # It has its dtype: to cast it again would cast its rotary tables too, which are float32 in any dtype.
    return model.to(device=device)  # pyright: ignore[reportCallIssue]


def reopen(opened: Callable[..., HuggingFaceModel], origin: Origin, device: str | torch.device) -> HuggingFaceModel:
    """Open the model of a run in another process, streamed if possible; refuse a model that has changed since."""
    model = opened(device=device, stream=True)
    if model.shards is not None:
        model.shards.require_same(origin)
    elif model.origin() != origin:
        raise ModelError(f"{model.name} is not the model that the run began with: its files have changed since.")
    return model


def path_of(source: str | Path) -> Path:
    """Return the path of a model, the bundled one's for its name; nothing is at the path of a name on the hub."""
    path = named(source)
    return EMBEDDED if str(source) == BUNDLED and not path.exists() else path


def place_at(source: str | Path, allow_pickle: bool) -> dict[str, Any]:
    """Return the place for transformers: a checked folder, a file inside, or a name on the hub."""
    path = path_of(source)
    if path.is_file() and path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        model_folder.check_folder(path, allow_pickle)
        return {"pretrained_model_name_or_path": str(path)}
    if isinstance(source, Path) or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"{source}: no such folder. Give a folder that has a config.json, or a name on the hub.")
    return model_folder.place_of(source)


def read_model(source: str, place: dict[str, Any], dtype: torch.dtype | None, allow_pickle: bool) -> PreTrainedModel:
    """Read a model by transformers in a dtype, or the checkpoint's, with private memory for its weights."""
    config = ask(source, lambda: AutoConfig.from_pretrained(**place))
    refuse_quantized(config)
    folder = Path(place["pretrained_model_name_or_path"])
    reader = model_class(source, config)
    if folder.is_dir() and "gguf_file" not in place:
        with suppress(model_folder.NotStreamable):
            ask(source, lambda: model_folder.check_layers(folder, config))
            _refuse_codes(folder, empty_model(source, config, place))
    options = place | {"dtype": dtype or "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
    if "gguf_file" not in place:
        # With pickles allowed, safetensors are still preferred where both are there.
        options["use_safetensors"] = None if allow_pickle else True
    elif "GgufConfig" in dir(transformers):
        # Releases before this class always unpack a GGUF file; later ones only if there is no kernel for its blocks.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = ask(source, lambda: reader.from_pretrained(**options))
    if others := [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]:  # 4.57: names alone
        first = min(others)
        raise ModelError(
            f"{source}: {first} has another shape in the checkpoint than by its config.json, "
            f"{list(model.state_dict()[first].shape)}. Copy or download it again, or correct its config.json."
        )
    refuse_more_layers(model, info["unexpected_keys"])
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{source}: the checkpoint lacks {len(missing)} tensors that the model needs, first {missing[0]}; "
            "they would be random. Copy or download it again, or correct its config.json."
        )
    if "gguf_file" in place:
        refuse_left_out(folder / place["gguf_file"], model)
    if type(model.config) is not type(config):
        logger.warning("%s: transformers reads its text alone; what is saved from memory has no images.", source)
    # On a CPU transformers maps the weights from their files: what is written to these would change the model.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def empty_model(source: str, config: PretrainedConfig, place: Mapping[str, Any], **options: Any) -> PreTrainedModel:
    reader = model_class(source, config)
    with parameters_on_meta():
        return ask(source, lambda: reader.from_config(config, trust_remote_code=place["trust_remote_code"], **options))


def _refuse_codes(folder: Path, model: PreTrainedModel) -> None:
    """Refuse weights stored as whole numbers, which transformers 5 would turn into unscaled floats."""
    inner = f"{model.base_model_prefix}."
    weights = {name.removeprefix(inner) for name, _ in model.named_parameters()}
    stored = {name: entry for path in model_folder.shard_files(folder) for name, entry in entries(path)[0].items()}
    refuse_other_codes({n: e.spec.code for n, e in sorted(stored.items()) if n.removeprefix(inner) in weights})


def _stream(
    source: str, place: dict[str, Any], dtype: torch.dtype | None, device: str | torch.device
) -> tuple[PreTrainedModel, Shards]:
    if "gguf_file" in place:
        raise model_folder.NotStreamable("a GGUF file is unpacked whole")
    config = ask(source, lambda: AutoConfig.from_pretrained(**place))
    refuse_quantized(config)
    where = ("pretrained_model_name_or_path", "revision", "local_files_only")
    folder = ask(source, lambda: model_folder.local_folder(*(place[key] for key in where if key in place)))
    model_folder.check_folder(folder, allow_pickle=True)
    ask(source, lambda: model_folder.check_layers(folder, config))
    stored = getattr(config, "dtype", None) or ask(source, lambda: model_folder.stored_dtype(folder))
    model = empty_model(source, config, place, dtype=dtype or stored)
    return model, Shards(folder, model, device, decoder_layers(model)[0], place["trust_remote_code"])
