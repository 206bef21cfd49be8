"""Layer settings of a comparison's variants: removals, and allocations of zeros or bits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.token_weights import TokenWeighting
from convexprune._runs.executors import check_patterns
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._allocating import allocate_each
from convexprune.adapters._removal.find import find_removal
from convexprune.adapters._token_weights import token_weights
from convexprune.errors import RecipeError

from ._side_by_side import Tokens
from ._variants import Variant


def layer_settings(model: HuggingFaceModel, variants: Sequence[Variant]) -> dict[str, LayerSettings]:
    """Return layer settings by variant. After a removal only operators that read the removed parts are pruned."""
    settings = _narrowed(model, variants)
    _check(model, settings.values())
    return settings


def _narrowed(model: HuggingFaceModel, variants: Sequence[Variant]) -> dict[str, LayerSettings]:
    asked = {variant.name: variant.recipe().build_pattern() for variant in variants}
    narrows = [pattern for pattern in asked.values() if pattern.removes]
    if not narrows:
        return {variant.name: variant.layer_settings() for variant in variants}
    if len({pattern.removes for pattern in asked.values()}) > 1:
        raise RecipeError(f"Pattern {str(narrows[0])!r} has its own operators: compare it with no other pattern.")
    found = {pattern: find_removal(model, pattern) for pattern in dict.fromkeys(narrows)}
    next(iter(found.values())).choose(model)
    pairs = zip(variants, narrows, strict=True)
    return {v.name: replace(v.layer_settings(), patterns=found[pattern].patterns) for v, pattern in pairs}


def allocated(
    model: HuggingFaceModel,
    tokens: Tokens,
    variants: Sequence[Variant],
    given_settings: Mapping[str, LayerSettings],
    batch_size: int,
) -> dict[str, LayerSettings]:
    """Return layer settings by variant, with zeros or bits spread by the variant's allocation."""
    asked = [(variant.allocation, given_settings[variant.name]) for variant in variants]
    found = allocate_each(model, tokens.calibration, tokens.held_out, asked, batch_size)
    weightings = {v.name: TokenWeighting.parse(v.recipe().token_weights) for v in variants}
    weights = {each: token_weights(model, each, tokens.calibration, batch_size) for each in set(weightings.values())}
    settings = {
        variant.name: replace(
            allocation.apply_to(given, variant.recipe().build_pattern()),
            token_weights=weights[weightings[variant.name]],
        )
        for variant, allocation, (_, given) in zip(variants, found, asked, strict=True)
    }
    _check(model, settings.values())
    return settings


def _check(model: HuggingFaceModel, settings: Iterable[LayerSettings]) -> None:
    for each in settings:
        check_patterns(model.layers, each)
