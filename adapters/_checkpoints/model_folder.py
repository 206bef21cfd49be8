"""The files of a model folder: weights, companions to copy, and reasons to refuse."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import constants, get_session, snapshot_download
from transformers import PretrainedConfig

from convexprune._container.folder import holds_pack
from convexprune._runs.folder import OWN
from convexprune._storage.failures import reading
from convexprune._storage.files import PARTS, Stamp, refuse_foreign
from convexprune._storage.tensors import DTYPES, entries
from convexprune.errors import ModelError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DOCUMENTS = ("README*.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # what people read, of a model on the hub
# Weights are not copied to the result: they are written anew, or would be the dense ones in another format.
NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")


class NotStreamable(Exception):
    """Why a checkpoint has to be loaded whole."""


def check_folder(folder: Path, allow_pickle: bool) -> None:
    """Name the faulty file of a folder, which transformers does not."""
    with reading(folder):
        paths = sorted(folder.iterdir())
        for path in paths:
            if path.suffix == ".safetensors" or (path.exists() and not path.is_dir()):
                Stamp.of(path)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: holds an adapter (adapter_config.json). Merge it first (merge_and_unload of peft) and save "
            "the result, or remove it to prune the weights without it."
        )
    if not (folder / CONFIG).is_file():
        names = [path.name for path in paths if not path.name.startswith(".")]
        held = f"{', '.join(names[:3])}{' and more' if names[3:] else ''}" if names else "nothing"
        gguf = next((f" Or give the GGUF file itself, {path}." for path in paths if path.suffix == ".gguf"), "")
        raise ModelError(
            f"{folder}: has no config.json, so it is not a model folder of transformers. It holds {held}. Give the "
            f"folder that save_pretrained wrote, or a name on the hub.{gguf}"
        )
    refuse_packed(folder)
    weights = [path for path in paths if path.suffix == ".safetensors"]
    pickles = [path.name for path in paths if path.suffix == ".bin"]
    if not weights and not (folder / INDEX).exists() and pickles and not allow_pickle:
        raise ModelError(
            f"{folder}: holds its weights only as pickles ({', '.join(pickles)}), which can run code when they are "
            "read. Convert them to safetensors, or pass allow_pickle=True if you trust them."
        )
    for path in weights:
        entries(path)


def refuse_packed(folder: Path) -> None:
    if holds_pack(folder):
        raise ModelError(
            f"{folder} is a pack. Unpack it first: convexprune unpack {folder} DIR; only convexprune.load reads packs."
        )


def check_layers(folder: Path, config: PretrainedConfig, stored: int | None = None) -> None:
    """Refuse, before modules are built, a configuration of more layers than the checkpoint can have."""
    asked = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    stored = sum(len(entries(path)[0]) for path in shard_files(folder)) if stored is None else stored
    if asked > stored:
        raise ModelError(
            f"{folder}: config.json asks for {asked:,} decoder layers, the checkpoint holds {stored:,} tensors. "
            "Copy or download both again."
        )


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    with reading(path):
        text = path.read_bytes()
    try:
        index = json.loads(text)
        names = {PurePosixPath(name) for name in index["weight_map"].values()}
        dict(index.get("metadata", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise ModelError(
            f'{path} is no index of shards: {{"weight_map": {{tensor: file}}}} is needed. Copy or download it again.'
        ) from cause
    for name in sorted(names):
        hidden = any(part.startswith(".") for part in name.parts)
        if name.is_absolute() or hidden or name.suffix != ".safetensors":
            raise ModelError(
                f"{path} names {str(name)!r}. Accepted: safetensors files in the folder itself or below it, not "
                "hidden. Move the file there."
            )
    return index


def shard_files(folder: Path) -> list[Path]:
    """Return the shards of a folder, by the choice of transformers."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise NotStreamable(f"there is no {WEIGHTS} and no {INDEX}")
    files = sorted({folder / name for name in read_index(folder)["weight_map"].values()})
    missing = [str(path.relative_to(folder)) for path in files if not path.exists()]
    if missing:
        raise ModelError(f"{folder}: {INDEX} names {', '.join(missing)}, which is missing. Download it again.")
    return files


def companions(folder: Path, with_code: bool) -> list[Path]:
    """Return the files to copy to the result: tokenizers and the like, the card, and trusted code."""
    found = []
    with reading(folder):
        for path in sorted(folder.iterdir()):
            ours = path.name in (CONFIG, *OWN) or path.match(PARTS)
            code = path.suffix == ".py" and not with_code
            if path.is_file() and not ours and not code and not path.name.endswith(NOT_COPIED):
                refuse_foreign(path, folder)
                found.append(path)
    return found


def hub_answers() -> bool:
    """Return True if the hub can be reached: asked once, in place of five times per file."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # the kinds are those of requests or httpx, by the release of huggingface_hub
        return False
    return True


def place_of(name: str) -> dict[str, Any]:
    """Return the place of a model for transformers; a silent hub is left alone."""
    return {"pretrained_model_name_or_path": name} | (
        {} if Path(name).exists() else {"local_files_only": not hub_answers()}
    )


def local_folder(source: str, revision: str, local_files_only: bool = False) -> Path:
    """Return the folder of a model, downloaded if need be."""
    if Path(source).is_dir():
        return Path(source)
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", *DOCUMENTS]
    return Path(
        snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
    )


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of the first floating-point tensor, for a config that names none."""
    found = (DTYPES.get(e.spec.code) for path in shard_files(folder) for e in entries(path)[0].values())
    dtype = next((d for d in found if d is not None and d.is_floating_point), None)
    if dtype is None:
        raise NotStreamable("it stores no floating-point tensor")
    return dtype
