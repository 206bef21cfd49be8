"""Choose the operators to prune, with a reason for every untouched linear map, and those of a recipe's rules."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import regex
from torch import Tensor
from transformers import PreTrainedModel

from convexprune._layerwise.model import DecoderLayer
from convexprune._layerwise.settings import LayerSettings
from convexprune._schema.settings import Rule
from convexprune.errors import ModelError, RecipeError, unknown
from convexprune.recipe import Recipe

from .operators import LINEAR_MODULES, UNKNOWN, Layout

PATIENCE = 10.0  # seconds for all names that a regular expression is matched with
LONGEST = 1000  # characters of a regular expression, and repetitions that its counts make
TIED = "tied to "  # begins the reason for weights that share memory
SMALL = 0.05  # of the parameters of the decoder layers


def left_alone(
    model: PreTrainedModel,
    layouts: Mapping[str, Layout],
    targets: Sequence[str],
    ignore: Sequence[str],
    because: str = "not among the targets of the recipe",
) -> dict[str, str]:
    """Return the reason for every matrix of a model that is not pruned.

    A pattern is a name or its last parts ("model.layers.3.self_attn.q_proj", "self_attn.q_proj", "q_proj"; "down_proj"
    also for all experts "mlp.experts.down_proj.0" and so on); a class ("Linear" is every linear map); or "re:" and a
    regular expression for the beginning of a name that is whole, relative to the layer, or the last part.
    """
    shared = ties(model)
    names: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LINEAR_MODULES) and not any(name.startswith(f"{layer}.") for layer in layouts):
            names[name] = name, name.rpartition(".")[2], type(module).__name__
            tied = shared.get(f"{name}.weight")
            reasons[name] = f"{TIED}{tied}" if tied else "not inside a decoder layer"
    operators = []
    for layer, layout in layouts.items():
        for relative, reason in layout.left_alone.items():
            reasons[f"{layer}.{relative}"] = reason
            names[f"{layer}.{relative}"] = f"{layer}.{relative}", relative, relative.rpartition(".")[2]
        for place in layout.places:
            operators.append(f"{layer}.{place.name}")
            parameter = f"{layer}.{place.path}"
            kind = type(model.get_submodule(f"{layer}.{place.module}".removesuffix("."))).__name__
            names[operators[-1]] = *_names(layer, place.name), kind
            if parameter in shared:
                reasons[operators[-1]] = f"{TIED}{shared[parameter]}"
    targeted, ignored = _matches(targets, names), _matches(ignore, names)
    for name in operators:
        if name in ignored:
            reasons.setdefault(name, "ignored by the recipe")
        elif name not in targeted:
            reasons.setdefault(name, because)
    if not any(name not in reasons for name in operators):
        examples = {reason: name for name, reason in reasons.items()}
        listed = "; ".join(f"{name}: {reason}" for reason, name in examples.items())
        known = dict.fromkeys(place.name for layout in layouts.values() for place in layout.places)
        raise ModelError(
            f"targets={list(targets)} and ignore={list(ignore)} leave no operator to prune ({listed}). "
            f"Operators of a decoder layer: {', '.join(known) or 'none'}."
        )
    return reasons


def shared_weights(left: Iterable[tuple[str, str]], layers: Iterable[DecoderLayer]) -> str | None:
    """Return a warning about operators of decoder layers that are left alone because they share weights, if any."""
    inside = tuple(f"{layer.name}." for layer in layers)
    tied = [(name, reason) for name, reason in left if name.startswith(inside) and reason.startswith(TIED)]
    if not tied:
        return None
    name, reason = tied[0]
    return (
        f"{len(tied)} operators are left as they are, because what is written to one is written to another: {name} is "
        f"{reason}{', ...' if tied[1:] else ''}. Give each its own weight to have them pruned."
    )


def unknown_maps(left: Iterable[tuple[str, str]], model: PreTrainedModel, layers: Iterable[DecoderLayer]) -> str | None:
    """Warn about matrices that are left alone because their use is unknown; None if their share is small."""
    inside = tuple(f"{layer.name}." for layer in layers)
    sizes = {name: p.numel() for name, p in model.named_parameters() if name.startswith(inside)}
    unknown = [(name, reason) for name, reason in left if name in sizes and reason.endswith(UNKNOWN)]
    share = sum(sizes[name] for name, _ in unknown) / sum(sizes.values())
    if share < SMALL:
        return None
    name, reason = unknown[0]
    return (
        f"{share:.0%} of the parameters of the decoder layers are left as they are, in {len(unknown)} matrices of "
        f"which it is not known what is done with them: {name} is {reason}{', ...' if unknown[1:] else ''}. Only the "
        "others are pruned."
    )


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Return, by parameter that shares memory, the name of a parameter with the same memory.

    Memory decides, not names, because families tie different parameters. Overlap counts: separate pieces of a storage
    are not tied. A tensor without memory shares only itself.
    """
    spans = sorted((*_span(p), name) for name, p in model.named_parameters(remove_duplicate=False))
    partners: dict[str, str] = {}
    holder = ("", 0, 0, "")  # of the spans so far, the one that reaches farthest
    for span in spans:
        device, start, end, name = span
        if device == holder[0] and start < holder[2]:
            partners[name] = holder[3]
            partners.setdefault(holder[3], name)
        if device != holder[0] or end > holder[2]:
            holder = span
    return partners


def _span(parameter: Tensor) -> tuple[str, int, int]:
    if parameter.is_meta:
        return f"nowhere {id(parameter)}", 0, 1
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    start = parameter.data_ptr()
    return str(parameter.device), start, start + (last + 1) * parameter.element_size()


def _matches(patterns: Sequence[str], names: Mapping[str, tuple[str, ...]], told: str = "") -> set[str]:
    """Return the whole names that match any pattern; a pattern without a match is an error in spelling."""
    if isinstance(patterns, str):
        raise RecipeError(f"Targets and ignore are lists of names; got the text {patterns!r}. Write [{patterns!r}].")
    matched: set[str] = set()
    for pattern in patterns:
        matches = matcher(pattern)
        found = {whole for whole, aliases in names.items() if any(map(matches, aliases))}
        if not found:
            short = {alias for _, *aliases in names.values() for alias in aliases}  # of the many layers
            raise ModelError(told + unknown("operator", pattern, short))
        matched |= found
    return matched


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a test whether a pattern is a name or its last parts, or "re:" and an expression for its beginning.

    Patterns may come from someone else's recipe, and `re` cannot be interrupted: so the package `regex` matches,
    which can, and stops after `PATIENCE` seconds in all.
    """
    if not pattern.startswith("re:"):
        return lambda name: f".{name}".endswith(f".{pattern}")
    text, left = pattern.removeprefix("re:"), PATIENCE
    try:
        re.compile(text)
        counts = prod(max(1, int(count)) for count in re.findall(r"[{,](\d+)(?=[,}])", text))
        if len(text) > LONGEST or counts > LONGEST:
            raise RecipeError(f"The pattern {pattern[:60]!r} is too large. Name the operators, or write a simpler one.")
        expression = regex.compile(text)
    except (re.error, regex.error, RecursionError, OverflowError) as cause:
        raise RecipeError(f"{pattern[:200]!r} is not a regular expression: {cause}. See Python's re module.") from cause

    def matches(name: str) -> bool:
        nonlocal left
        began = time.monotonic()
        try:
            return expression.match(name, timeout=max(left, 1e-3)) is not None
        except TimeoutError as cause:
            raise RecipeError(
                f"The pattern {pattern[:60]!r} takes too long to match. Name the operators, or write a simpler one."
            ) from cause
        finally:
            left -= time.monotonic() - began

    return matches


def with_rules(settings: LayerSettings, recipe: Recipe, layers: Sequence[DecoderLayer]) -> LayerSettings:
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
        matched = _matches(rule.targets, names, "A rule is about no operator that is pruned. ")
        if matched <= found.keys():
            earlier = sorted({found[name] + 1 for name in matched})
            raise RecipeError(
                f"Rule {number + 1} ({', '.join(rule.targets)}) is never used: rule {', '.join(map(str, earlier))} "
                "comes first and matches all of its operators. Put the narrower rule first, or leave one out."
            )
        found |= dict.fromkeys(matched - found.keys(), number)
    return {name: found[name] for name in names if name in found}


def _names(layer: str, operator: str) -> Iterator[str]:
    """Yield the names of an operator, the whole name first."""
    yield f"{layer}.{operator}"
    yield operator
    path, _, last = operator.rpartition(".")
    if last.isdigit():  # of an expert
        yield path
        last = path.rpartition(".")[2]
    yield last
    yield "Linear"
