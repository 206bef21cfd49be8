"""Which operators of a model are pruned, and the reason for each linear map that is left alone."""

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from convexprune.errors import ModelError, RecipeError, unknown

from .family import Family


def left_alone(model: PreTrainedModel, family: Family, targets: Sequence[str], ignore: Sequence[str]) -> dict[str, str]:
    """The reason, by name, for every `nn.Linear` of the model that is not to be pruned.

    A pattern is a name, whole ("model.layers.3.self_attn.q_proj"), relative to the layer ("self_attn.q_proj") or
    only its last part ("q_proj"); a class ("Linear"); or "re:" and a regular expression that matches one of these
    names from its beginning.

    Raises:
        ModelError: a pattern matches no linear map, or no operator is left to prune.
        RecipeError: a regular expression is not one.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {name: _names(name, module, family) for name, module in linears.items()}
    targeted, ignored = _matches(targets, names), _matches(ignore, names)
    shared = ties(model)
    reasons = {}
    for name in linears:
        _, relative, _, _ = names[name]
        if f"{name}.weight" in shared:
            reasons[name] = f"tied to {shared[f'{name}.weight']}"
        elif relative == name:
            reasons[name] = "not inside a decoder layer"
        elif not any(relative in stage for stage in family.stages):
            reasons[name] = f"not an operator of the {family.model_type} family"
        elif name in ignored:
            reasons[name] = "ignored by the recipe"
        elif name not in targeted:
            reasons[name] = "not among the targets of the recipe"
    if len(reasons) == len(linears):
        examples = {reason: name for name, reason in reasons.items()}
        listed = "; ".join(f"{name}: {reason}" for reason, name in examples.items())
        raise ModelError(
            f"targets={list(targets)} and ignore={list(ignore)} leave no operator to prune ({listed}). "
            f"Operators of a decoder layer: {', '.join(name for stage in family.stages for name in stage)}."
        )
    return reasons


def ties(model: PreTrainedModel) -> dict[str, str]:
    """For each parameter that shares memory with another, the name of one that it shares it with.

    By memory and not by name, because families differ in what they tie. Overlap is what counts: parameters that are
    separate pieces of one storage are not tied.
    """
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.nbytes, name)
        for name, p in model.named_parameters(remove_duplicate=False)
        if not p.is_meta  # of a model that is streamed, only what is outside of its decoder layers has memory
    )
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


def _names(name: str, module: nn.Module, family: Family) -> tuple[str, str, str, str]:
    """All that a pattern may call it: whole name, relative to its decoder layer (if it is in one), last part, class."""
    relative = re.sub(rf"^{re.escape(family.layers)}\.\d+\.", "", name)
    return name, relative, name.rpartition(".")[2], type(module).__name__


def _matches(patterns: Sequence[str], names: dict[str, tuple[str, ...]]) -> set[str]:
    """The whole names of all that match any pattern; each pattern must match something, or it is misspelt."""
    if isinstance(patterns, str):
        raise RecipeError(f"Targets and ignore are lists of names; got the text {patterns!r}. Write [{patterns!r}].")
    matched: set[str] = set()
    for pattern in patterns:
        found = {whole for whole, aliases in names.items() if _match(pattern, aliases)}
        if not found:
            raise ModelError(unknown("operator", pattern, _examples(names.values())))
        matched |= found
    return matched


def _match(pattern: str, aliases: Iterable[str]) -> bool:
    if not pattern.startswith("re:"):
        return pattern in aliases
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as cause:
        raise RecipeError(f"{pattern!r} is not a regular expression: {cause}. See Python's re module.") from cause
    return any(expression.match(alias) for alias in aliases)


def _examples(names: Iterable[tuple[str, ...]]) -> set[str]:
    """Enough names to see how they are written: of the many layers, only what is relative to them."""
    return {alias for _, *short in names for alias in short}
