"""Load a model of transformers from a pack, an ordinary folder or a name on the hub."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from convexprune._container.file import contents, is_packed
from convexprune._container.folder import holds_pack, source_files, unpack
from convexprune._device.machine import default_device
from convexprune._device.switches import pinned
from convexprune._storage.files import named
from convexprune.errors import ModelError
from convexprune.recipe import make_recipe

from .._checkpoints.model_folder import check_folder, check_layers, local_folder
from .._checkpoints.reading import ask
from .loading import empty_model, place_at, read_model, unchanged_at

TIMES, SPARE = 2, 1 << 24
"""Weights in a pack for one of the model, and further ones: checkpoints hold tied weights twice, and old masks."""


@pinned()
def load(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    allow_changed: bool = False,
) -> PreTrainedModel:
    """Load the model of a pack, ready to use: `from_pretrained` for packs, which also reads ordinary folders.

    A pack is unpacked to a temporary folder (in TMPDIR), with the room of the unpacked model during the load. A
    tokenizer is read directly: `AutoTokenizer.from_pretrained(source)`.

    Args:
        source: a folder, or a name on the hub.
        device: "auto" is the GPU if there is one; "cpu", "cuda", "cuda:1", or a torch device.
        dtype: "float32", "bfloat16", "float16", or a torch dtype; None is the stored dtype.
        trust_remote_code: let transformers run code that a checkpoint brings.
        revision: revision of a name on the hub: a branch, a tag or a commit.
        allow_changed: take the result of a run although its files are not those that the run wrote.

    Returns:
        The model of transformers.

    Raises:
        ModelError: files are missing or damaged, or hold no model that can be pruned.
        OutputError: the temporary folder has not enough room.
        RecipeError: there is no such device here, or no such dtype.
    """
    recipe = make_recipe(model=str(source), device=device, dtype=dtype)
    target = default_device(recipe.device)
    options = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    with TemporaryDirectory() as temporary:
        place = _unpacked(source, options, Path(temporary, "model"), allow_changed)
        with unchanged_at(place, allow_changed):
            model = read_model(str(source), place | options, recipe.torch_dtype, allow_pickle=False)
    model.name_or_path = model.config.name_or_path = str(source)
    model.to(device=target)  # pyright: ignore[reportCallIssue]
    return model


def _unpacked(source: str | Path, options: dict[str, Any], folder: Path, allow_changed: bool) -> dict[str, Any]:
    """Return the place for transformers: `folder` with the unpacked files, if the source is a pack."""
    path = named(source)
    if not (path.is_dir() and holds_pack(path)):
        place = place_at(source, allow_pickle=False)
        if "local_files_only" not in place:  # a folder or a file
            return place
        name, offline = place["pretrained_model_name_or_path"], place["local_files_only"]
        path = ask(name, lambda: local_folder(name, options["revision"], offline))
        if not holds_pack(path):
            return place
    _require_admitted(path, options)
    unpack(path, folder, allow_changed=allow_changed, allow_large=True)
    check_folder(folder, allow_pickle=False)
    return {"pretrained_model_name_or_path": str(folder)}


def _require_admitted(folder: Path, options: dict[str, Any]) -> None:
    """Refuse, before anything is written, a pack of more weights than the model of its config.json can have."""
    _, files = source_files(folder)
    packs = [contents(folder / path)[1] for path in files if is_packed(path)]
    config = ask(str(folder), lambda: AutoConfig.from_pretrained(folder, **options))
    check_layers(folder, config, sum(map(len, packs)))
    known = sum(tensor.numel() for tensor in empty_model(str(folder), config, options).state_dict().values())
    count = sum(weights for tensors in packs for weights, _ in tensors.values())
    if count > TIMES * known + SPARE:
        raise ModelError(
            f"{folder} unpacks to {count:,} weights, and the model of its config.json has {known:,}. Accepted: {TIMES} "
            f"times as many, and {SPARE:,} more. Unpack it first (convexprune unpack) if you trust it."
        )
