"""The operators that the rules of a recipe concern, and the resulting settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from convexprune._layerwise.model import DecoderLayer
from convexprune._layerwise.settings import LayerSettings
from convexprune._schema.settings import Rule
from convexprune.errors import ModelError, RecipeError, unknown
from convexprune.recipe import Recipe

from .selection import matcher


def with_rules(settings: LayerSettings, recipe: Recipe, layers: Sequence[DecoderLayer]) -> LayerSettings:
    """Return the settings of a run with the rules of its recipe."""
    found, built = rule_of(recipe.rules, layers), recipe.build_rules()
    return replace(
        settings,
        patterns={**settings.patterns, **{name: built[number][0] for name, number in found.items()}},
        pruners={name: pruner for name, number in found.items() if (pruner := built[number][1]) is not None},
        rules={name: number + 1 for name, number in found.items()},
    )


def rule_of(rules: Sequence[Rule], layers: Sequence[DecoderLayer]) -> Mapping[str, int]:
    """Return the number, from 0, of the first matching rule, by "layer.operator"."""
    names = {f"{layer.name}.{o.name}": tuple(_names(layer.name, o.name)) for layer in layers for o in layer.operators}
    found: dict[str, int] = {}
    for number, rule in enumerate(rules):
        matched = {whole for target in rule.targets for whole in _matched(target, names)}
        if matched <= found.keys():
            earlier = sorted({found[name] + 1 for name in matched})
            raise RecipeError(
                f"Rule {number + 1} ({', '.join(rule.targets)}) is never used: rule {', '.join(map(str, earlier))} "
                "comes first and matches all of its operators. Put the narrower rule first, or leave one out."
            )
        found |= dict.fromkeys(matched - found.keys(), number)
    return {name: found[name] for name in names if name in found}


def _matched(target: str, names: Mapping[str, tuple[str, ...]]) -> list[str]:
    matches = matcher(target)
    if matched := [whole for whole, aliases in names.items() if any(map(matches, aliases))]:
        return matched
    raise ModelError(f"A rule is about no operator that is pruned. {unknown('operator', target, _short(names))}")


def _short(names: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {alias for _, *short in names.values() for alias in short}


def _names(layer: str, operator: str) -> Iterator[str]:
    """Yield the names of an operator, the whole name first, as `selection.left_alone`, without other classes."""
    yield f"{layer}.{operator}"
    yield operator
    path, _, last = operator.rpartition(".")
    if last.isdigit():  # of an expert
        yield path
        last = path.rpartition(".")[2]
    yield last
    yield "Linear"
