"""The outline of a model from its configuration, and the needs of a run on it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from convexprune._layerwise.allocation import WEIGHED
from convexprune._layerwise.model import DecoderLayer
from convexprune._runs import cost, sizes
from convexprune._runs.sizes import LayerSize, ModelSize, Stack
from convexprune._storage.files import named
from convexprune.errors import ModelError
from convexprune.quantizers import QUANTIZERS
from convexprune.recipe import Recipe

from .._allocating import gradient_windows
from .._checkpoints.admission import refuse_quantized
from .._checkpoints.model_folder import NotStreamable, check_folder, check_layers, place_of
from .._checkpoints.reading import ask, model_class, parameters_on_meta
from .._data.calibration import DEFAULT_LENGTH
from .._discovery.experts import fused_parameters
from .random_weights import RandomModel


@dataclass(frozen=True)
class Outline:
    """Facts on a model without its weights."""

    name: str
    layers: Sequence[DecoderLayer]
    left_alone: Mapping[str, str]  # reasons by name of untouched matrix
    size: ModelSize
    dtype: torch.dtype
    positions: int  # largest number of tokens in a window
    notes: tuple[str, ...]  # unknown quantities, and their consequences


def read_outline(source: str | Path, recipe: Recipe, trust_remote_code: bool = False) -> Outline:
    """Return the outline of a model from its configuration, by a run's discovery on random weights."""
    config = _config(source, trust_remote_code)
    refuse_quantized(config)
    reader, remote = model_class(str(source), config), {"trust_remote_code": trust_remote_code}
    dtype = recipe.torch_dtype or getattr(config, "dtype", None) or torch.float32
    with parameters_on_meta():
        built = ask(str(source), lambda: reader.from_config(config, dtype=dtype, **remote))
    model = RandomModel(built, name=str(source), targets=recipe.targets, ignore=recipe.ignore)
    whole = any(fused_parameters(module) for layer in model.layers for module in layer.module.modules())
    notes = []
    if whole:
        notes.append("Its experts are fused while transformers loads them, so the model is loaded whole.")
    if any(not group.token_aligned for layer in model.layers for group in layer.groups):
        notes.append("How many tokens each expert is sent is known only in a run: an even share is assumed.")
    size = _size(model, config.get_text_config(), dtype, whole)
    return Outline(model.name, model.layers, dict(model.left_alone), size, dtype, model.max_positions, tuple(notes))


def _config(source: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    path = named(source)
    if path.is_dir():
        check_folder(path, allow_pickle=True)
    if not path.exists() and (isinstance(source, Path) or str(source).count("/") > 1 or str(source)[0] in "./~"):
        raise ModelError(f"{source}: no such folder or file. Give a folder, a config.json, or a name on the hub.")
    place: dict[str, Any] = place_of(str(path if path.exists() else source)) | {"trust_remote_code": trust_remote_code}
    config = ask(str(source), lambda: AutoConfig.from_pretrained(**place))
    if path.is_dir():
        with suppress(NotStreamable):
            ask(str(source), lambda: check_layers(path, config))
    return config


def _size(model: RandomModel, config: PretrainedConfig, dtype: torch.dtype, whole: bool) -> ModelSize:
    counted: Counter[tuple[Any, ...]] = Counter()
    for layer in model.layers:
        sizes = [p.numel() for p in layer.module.parameters()]
        counted[_stages(layer, config), sum(sizes), max(sizes)] += 1
    inside = {id(p) for layer in model.layers for p in layer.module.parameters()}
    outside = [p.numel() for p in model.model.parameters() if id(p) not in inside]
    return ModelSize(
        layers=tuple(LayerSize(*facts, count=count) for facts, count in counted.items()),
        fixed=sum(outside),
        largest_fixed=max(outside, default=0),
        hidden=config.hidden_size,
        itemsize=dtype.itemsize,
        whole=whole,
    )


def _stages(layer: DecoderLayer, config: PretrainedConfig) -> tuple[tuple[Stack, ...], ...]:
    """Return the stacks by stage; experts get equal shares of the tokens."""
    piled = max(
        (len(pile) for module in layer.module.modules() for pile in fused_parameters(module).values()), default=0
    )
    chosen = getattr(config, "num_experts_per_tok", 1)
    return tuple(
        tuple(
            Stack(
                tuple(operator.name for operator in group.operators),
                tuple(operator.shape[0] for operator in group.operators),
                group.operators[0].shape[1],
                group.token_aligned,
                1.0
                if group.token_aligned
                else min(1.0, chosen / (piled or sum(not other.token_aligned for other in stage))),
            )
            for group in stage
        )
        for stage in layer.stages
    )


GIB = 1 << 30


def setting_of(recipe: Recipe, outline: Outline) -> sizes.Setting:
    """Return the settings that decide the cost of a run."""
    length = recipe.max_seq_length or min(DEFAULT_LENGTH, outline.positions)
    weighed, method = recipe.allocation in WEIGHED, recipe.preset or recipe.method
    return sizes.Setting(
        samples=recipe.num_calibration_samples,
        held_out=recipe.spare_samples,
        length=length,
        batch=recipe.batch_size,
        method=sizes.method_cost(method, bool(recipe.refit), weighed),
        correction=recipe.error_correction > 0,
        dense_prefix=recipe.prefix == "dense",
        bound=recipe.bound_rows > 0,
        gradients=min(gradient_windows(recipe.allocation, length), recipe.num_calibration_samples),
        side_by_side=recipe.build_pruner().side_by_side,
        input_errors=QUANTIZERS[recipe.quantizer].input_errors,
    )


def device_bytes(source: str | Path, recipe: Recipe, trust_remote_code: bool = False) -> int:
    """Return the device memory that a run needs by its formula."""
    outline = read_outline(source, recipe, trust_remote_code)
    return cost.memory(outline.size, setting_of(recipe, outline)).device


def what_needs_less(source: str | Path, recipe: Recipe, trust_remote_code: bool = False) -> str:
    """Return a sentence with the device memory that a run needs, and settings that need less."""
    outline = read_outline(source, recipe, trust_remote_code)
    setting = setting_of(recipe, outline)
    needed = cost.memory(outline.size, setting).device
    ways = cost.cheaper(setting, bool(recipe.refit)).items()
    sizes_by_way = {way: cost.memory(outline.size, other).device for way, other in ways}
    less = [f"{way} {gib(size)}" for way, size in sizes_by_way.items() if size < needed]
    told = f" With other settings: {', '.join(less)}." if less else ""
    return f"By its formula this run needs {gib(needed)}, beside what else is there.{told}"


def gib(size: float) -> str:
    """Return bytes for a reader."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"
