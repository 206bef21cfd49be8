"""The files of a model folder: weights, companions and documents to copy, and reasons to refuse."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, constants, get_session, snapshot_download
from transformers import PretrainedConfig

from convexprune._container.folder import holds_pack
from convexprune._runs.folder import OWN
from convexprune._storage.checkpoint import INDEX, WEIGHTS, checkpoint_files
from convexprune._storage.failures import reading
from convexprune._storage.files import PARTS, Stamp, read_text, refuse_foreign
from convexprune._storage.tensors import DTYPES, entries
from convexprune.errors import ModelError, OutputError, shown

CONFIG = "config.json"
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


def shard_files(folder: Path) -> list[Path]:
    if not (files := checkpoint_files(folder)):
        raise NotStreamable(f"there is no {WEIGHTS} and no {INDEX}")
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
    """Return the type of the first floating-point tensor, for a config that names none."""
    found = (DTYPES.get(e.spec.code) for path in shard_files(folder) for e in entries(path)[0].values())
    dtype = next((d for d in found if d is not None and d.is_floating_point), None)
    if dtype is None:
        raise NotStreamable("it stores no floating-point tensor")
    return dtype


CARD = re.compile(r"README(-base)*\.md")
LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)", re.IGNORECASE)
KEPT = ("license", "license_name", "license_link", "language")
LONGEST, LONGEST_VALUE = 1 << 20, 200  # bytes of a card; characters of a value that is kept of it

logger = logging.getLogger(__name__)


def result_name(name: str) -> str:
    """Return the name of a file in the result: a base's card gets "-base", because README.md is the result's."""
    return f"{name.removesuffix('.md')}-base.md" if CARD.fullmatch(name) else name


def documents(folder: Path) -> list[Path]:
    with reading(folder):
        found = [path for path in sorted(folder.iterdir()) if CARD.fullmatch(path.name) or LICENCE.match(path.name)]
        found = [path for path in found if path.is_file() and path.suffix != ".py"]
    for path in found:
        refuse_foreign(path, folder)
    return found


def said_of_base(folder: Path | None) -> dict[str, Any]:
    """Return licence and language of the base model's card by name on the hub, and the "files" of the result."""
    found = [] if folder is None else documents(folder)
    cards = sorted((path for path in found if CARD.fullmatch(path.name)), key=lambda path: len(path.name))
    metadata = _metadata(cards[0]) if cards else {}
    return metadata | ({"files": [result_name(path.name) for path in found]} if found else {})


def _metadata(card: Path) -> dict[str, Any]:
    """Return the kept values of a card; for an unreadable card none, with a warning."""
    try:
        text = read_text(card, LONGEST)
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}
    except (OutputError, yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as cause:
        logger.warning("%s cannot be read: the licence is not named in the result's card (%s)", card, shown(str(cause)))
        return {}
    return {name: data[name] for name in KEPT if _is_plain(data.get(name))}


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) and len(value) <= LONGEST_VALUE else [value]
    return all(isinstance(each, str) and 0 < len(each) <= LONGEST_VALUE for each in values)
