"""The needs of a run by recipe and outline, for `inspect` and for errors by lack of memory."""

from pathlib import Path

from convexprune._layerwise.allocation import WEIGHED
from convexprune._runs import cost, sizes
from convexprune.quantizers import QUANTIZERS
from convexprune.recipe import Recipe

from .._allocating import gradient_windows
from .._data.calibration import DEFAULT_LENGTH
from .outline import Outline, read_outline

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
