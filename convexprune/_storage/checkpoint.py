"""The safetensors files of a model folder that transformers reads."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from convexprune._storage.failures import reading
from convexprune.errors import ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the one file or the shards of a folder, by the choice of transformers; none without either."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    files = sorted({folder / name for name in read_index(folder)["weight_map"].values()})
    missing = [str(path.relative_to(folder)) for path in files if not path.exists()]
    if missing:
        raise ModelError(f"{folder}: {INDEX} names {', '.join(missing)}, which is missing. Download it again.")
    return files
