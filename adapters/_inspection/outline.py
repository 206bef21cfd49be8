"""The outline of a model from its configuration, and the needs of a run on it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from convexprune._layerwise.allocation import LOOKING, SURVEYED, WEIGHED
from convexprune._layerwise.model import DecoderLayer
from convexprune._layerwise.steps.survey import needs
from convexprune._runs import cost, sizes
from convexprune._runs.sizes import LayerSize, ModelSize, Stack
from convexprune.errors import ModelError
from convexprune.pruners import AbstractPruner, Cost, SparseGPT
from convexprune.quantizers import QUANTIZERS
from convexprune.recipe import Recipe

from .._allocating import WINDOWS, gradient_windows
from .._checkpoints.admission import refuse_quantized
from .._checkpoints.model_folder import NotStreamable, check_folder, check_layers, place_of
from .._checkpoints.reading import ask
from .._data.calibration import DEFAULT_LENGTH
from .._discovery.experts import FusedExperts, fused_parameters
from .._discovery.family import decoder_layers
from .._huggingface import HuggingFaceModel
from .._loading.loading import empty_model, path_of
from .._types import ends

ADDED = torch.ops.aten.addmm.default
PRODUCTS = (ADDED, torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


class RandomModel(HuggingFaceModel):
    """A model with parameters on the meta device; weights of a decoder layer are random while resident."""

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        inside, _ = decoder_layers(model)
        outside = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{inside}.")}
        model.load_state_dict(_random(outside), strict=False, assign=True)
        model.tie_weights()
        super().__init__(model, **options)

    @property
    def streams(self) -> bool:
        return True

    @contextmanager
    def resident(self, layer: DecoderLayer) -> Iterator[None]:
        away = layer.module.state_dict()
        layer.module.load_state_dict(_random(away), assign=True)
        try:
            with ExitStack() as each_expert_by_itself, _QuickProducts():
                for module in layer.module.modules():
                    if fused_parameters(module):
                        each_expert_by_itself.enter_context(FusedExperts(module).looped())
                yield
        finally:
            layer.module.load_state_dict(away, assign=True)


class _QuickProducts(TorchDispatchMode):
    """Replace products with random weights by a sum that depends on every input, as discovery requires."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or not _overlaps(args[-1]):
            return func(*args, **(kwargs or {}))
        x, weight = args[-2:]
        inputs, outputs = weight.shape[-2:]
        own = x[..., torch.arange(outputs) % inputs] * weight[..., :1, :]
        product = own + x.mean(-1, keepdim=True)
        return product + args[0] if func is ADDED else product


def _random(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return reproducible values for tensors without values: random matrices, and vectors of ones."""
    generator = torch.Generator().manual_seed(0)
    return {name: _values(tensor, generator) if tensor.is_meta else tensor for name, tensor in state.items()}


def _values(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return ones, or a matrix whose rows are windows of a short random sequence: W[i, j] = r[2 i + j]."""
    if like.dim() < 2:
        return torch.ones_like(like, device="cpu")
    strides = tuple(range(like.dim(), 0, -1))
    length = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True))
    numbers = torch.randn(length, dtype=torch.float32, generator=generator)
    return numbers.to(like.dtype).as_strided(like.shape, strides)


def _overlaps(weight: Tensor) -> bool:
    return weight.untyped_storage().nbytes() < weight.nbytes


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
    ends: tuple[str, ...]  # names of embedding and head


def read_outline(source: str | Path | PreTrainedModel, recipe: Recipe, trust_remote_code: bool = False) -> Outline:
    """Return the outline of a model from its configuration, by a run's discovery on random weights."""
    if isinstance(source, PreTrainedModel):
        config, stored, source = source.config, source.dtype, source.name_or_path or type(source).__name__
    else:
        config = _config(source, trust_remote_code)
        stored = getattr(config, "dtype", None) or torch.float32
    refuse_quantized(config)
    dtype = recipe.torch_dtype or stored
    built = empty_model(str(source), config, {"trust_remote_code": trust_remote_code}, dtype=dtype)
    chosen = {"targets": recipe.targets, "ignore": recipe.ignore}
    model = ask(str(source), lambda: RandomModel(built, name=str(source), **chosen))  # its layers are run once
    whole = any(fused_parameters(module) for layer in model.layers for module in layer.module.modules())
    notes = []
    if whole:
        notes.append("Its experts are fused while transformers loads them, so the model is loaded whole.")
    if any(not group.token_aligned for layer in model.layers for group in layer.groups):
        notes.append("How many tokens each expert is sent is known only in a run: an even share is assumed.")
    size = _size(model, config.get_text_config(), dtype, whole)
    left, last = dict(model.left_alone), tuple(ends(model))
    return Outline(model.name, model.layers, left, size, dtype, model.max_positions, tuple(notes), last)


def _config(source: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    path = path_of(source)
    if path.is_dir():
        check_folder(path, allow_pickle=True)
    if not path.exists() and (isinstance(source, Path) or str(source).count("/") > 1 or str(source)[0] in "./~"):
        raise ModelError(f"{source}: no such folder or file. Give a folder, a config.json, or a name on the hub.")
    if path.is_file() and path.suffix == ".gguf":  # what transformers reads of experts there is wrong
        raise ModelError(
            f"{source}: a GGUF file has no config.json, which is all that is read here. Give the model that it was "
            "made from."
        )
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
    length = recipe.max_seq_length or min(DEFAULT_LENGTH, outline.positions)
    pruner = recipe.build_pruner()
    method, scaled = method_of(recipe, pruner), cost.SCALED * (recipe.allocation in WEIGHED)
    seen = min(WINDOWS, recipe.num_calibration_samples) + (recipe.spare_samples if recipe.target is None else 0)
    return sizes.Setting(
        samples=recipe.num_calibration_samples,
        held_out=recipe.spare_samples,
        length=length,
        batch=recipe.batch_size,
        method=method._replace(rectangles=method.rectangles + scaled),
        correction=recipe.error_correction > 0,
        dense_prefix=recipe.prefix == "dense",
        bound=recipe.bound_rows > 0,
        gradients=min(gradient_windows(recipe.allocation, length), recipe.num_calibration_samples),
        surveyed=seen if recipe.allocation in LOOKING else 0,
        survey=needs(recipe.build_pattern()) if recipe.allocation in SURVEYED else Cost(),
        side_by_side=pruner.side_by_side,
        input_errors=QUANTIZERS[recipe.quantizer].input_errors,
    )


def method_of(recipe: Recipe, pruner: AbstractPruner) -> Cost:
    """Return the needs of a pruner, if zeros are asked for, and of the recipe's quantizer, if codes are."""
    grid, dense = recipe.build_pattern().grid, recipe.sparsity == 0
    needs = Cost() if dense else pruner.cost
    return needs if grid is None else needs.then(recipe.layer_settings().quantizer.cost(grid, dense))


def device_bytes(model: PreTrainedModel, recipe: Recipe, trust_remote_code: bool = False) -> int:
    outline = read_outline(model, recipe, trust_remote_code)
    return cost.memory(outline.size, setting_of(recipe, outline)).device


def bytes_by_change(recipe: Recipe, outline: Outline, setting: sizes.Setting) -> dict[str, int]:
    """Return settings that may need less memory, and the bytes that a run then needs."""
    ways = cost.cheaper(setting, method_of(recipe, SparseGPT()), bool(recipe.refit))
    return {way: cost.memory(outline.size, other).device for way, other in ways.items()}


def what_needs_less(source: str | Path, recipe: Recipe, trust_remote_code: bool = False) -> str:
    """Return a sentence with the device memory that a run needs, and settings that need less."""
    outline = read_outline(source, recipe, trust_remote_code)
    setting = setting_of(recipe, outline)
    needed = cost.memory(outline.size, setting).device
    ways = bytes_by_change(recipe, outline, setting).items()
    less = [f"{way} {gib(size)}" for way, size in ways if size < needed]
    told = f" With other settings: {', '.join(less)}." if less else ""
    return f"By its formula this run needs {gib(needed)}, beside what else is there.{told}"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"
