"""The variants of a comparison by name, and their layer settings: method, sparsity, pattern, convention, allocation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convexprune._layerwise.settings import LayerSettings, TokenWeighting
from convexprune._runs.executors import check_patterns
from convexprune._schema.group import from_yaml
from convexprune.adapters import HuggingFaceModel, allocate_each, find_removal, token_weights
from convexprune.constraints import parse_pattern
from convexprune.errors import RecipeError, unknown
from convexprune.pruners import METHODS
from convexprune.quantizers import QUANTIZERS
from convexprune.recipe import SOLVERS, Recipe, make_recipe

from ._side_by_side import Tokens

OWN_BENCHMARKS = {"layers": "benchmarks/depth.py", "experts": "benchmarks/experts.py"}
CONVENTIONS: dict[str, tuple[str, float, str]] = {
    "dense": ("dense", 1.0, "operator"),
    "dense-half": ("dense", 0.5, "operator"),
    "dense-none": ("dense", 0.0, "operator"),
    "dense-layer": ("dense", 1.0, "residual_stream"),
    "pruned-own": ("pruned", 0.0, "operator"),
    "pruned-quarter": ("pruned", 0.25, "operator"),
    "pruned-half": ("pruned", 0.5, "operator"),
    "pruned-dense": ("pruned", 1.0, "operator"),
    "pruned-layer": ("pruned", 0.5, "residual_stream"),
}
"""Which network feeds a decoder layer, how much of earlier errors an operator corrects, and which (docs/compare.md)."""

OWN = {
    "alps": "pruned-own",
    "fistapruner": "dense",
    "gptaq": "pruned-quarter",
    "gptq": "pruned-own",
    "magnitude": "dense-none",
    "osscar": "pruned-own",
    "qep": "pruned-half",
    "rtn": "dense-none",
    "sparsegpt": "pruned-own",
    "wanda": "pruned-own",
    "wanda-sp": "pruned-own",
}
"""What the paper or the code of each method or quantizer does; of ours, the recipe's default."""
OF_RECIPE = ("refit", "quantize", "bits", "group_size", "token_weights", "refine")
"""Settings of the recipe that a method may name beside its own."""

BY_ROW = ("wanda",)
"""Methods whose paper prunes every row alike; the others choose from a whole matrix."""
QUOTAS = ("matrix", "own", "row")


@dataclass(frozen=True)
class Variant:
    method: str
    pattern: str
    sparsity: float | None
    convention: str
    quota: str = "matrix"  # of an unstructured pattern: "matrix" or "row"
    allocation: str = "uniform"

    @property
    def name(self) -> str:
        spread = "" if self.allocation == "uniform" else f" {self.allocation}"
        return f"{self.method} {self.target} {self.convention}{spread}{' by row' if self.quota == 'row' else ''}"

    @property
    def target(self) -> str:
        if self.sparsity is None:
            return self.pattern
        return f"{self.sparsity:g}" if self.pattern == "unstructured" else f"{self.pattern} {self.sparsity:g}"

    @property
    def zeros(self) -> float:
        return parse_pattern(self.pattern, self.sparsity).sparsity

    def recipe(self) -> Recipe:
        prefix, correction, target = CONVENTIONS[self.convention]
        return make_recipe(
            model="",
            **_method(self.method),
            pattern=self.pattern,
            sparsity=self.sparsity,
            quota=self.quota,
            allocation=self.allocation,
            prefix=prefix,
            error_correction=correction,
            error_target=target,
        )

    def layer_settings(self) -> LayerSettings:
        return self.recipe().layer_settings()


def make_variants(
    methods: Sequence[str],
    sparsities: Sequence[float],
    patterns: Sequence[str],
    conventions: Sequence[str],
    quota: str = "own",
    allocations: Sequence[str] = ("own",),
) -> list[Variant]:
    """Return every method x pattern x sparsity x convention once; an N:M pattern fixes its sparsity.

    A method is a name of `convexprune.pruners`, a solver's for the convex method with that solver, or a quantizer's
    (`QUANTIZERS`), with optional settings: "sparsegpt:damping=0.1", "descent:quantize=int4:beam=1". It may name its
    convention, allocation and quota: "fista:convention=pruned-layer:allocation=half-curve". "own" is the convention of
    the method's paper, the recipe's default allocation, and the quota by row for Wanda, as published (unless rows
    compete).
    """
    lists = {"methods": methods, "sparsity": sparsities, "pattern": patterns, "convention": conventions}
    for name, values in (lists | {"allocation": allocations}).items():
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise RecipeError(f"{name} names {twice[0]} twice. Leave one of them out.")
    for kind in (parse_pattern(pattern).removes for pattern in patterns):
        if kind in OWN_BENCHMARKS:
            raise RecipeError(
                f"Pattern {kind!r} is compared by {OWN_BENCHMARKS[kind]}: compare has all decoder layers and experts."
            )
    variants = {
        _variant(method, pattern, sparsity, convention, own.get("quota", [quota])[0], allocation): None
        for method, own in map(_without_own, methods)
        for pattern in patterns
        for sparsity in (sparsities if parse_pattern(pattern).continuous else [None])
        for convention in own.get("convention", conventions)
        for allocation in own.get("allocation", allocations)
    }
    for variant in variants:
        variant.layer_settings()
    if not variants:
        raise RecipeError("There is nothing to compare: name at least one method, sparsity, pattern and convention.")
    return list(variants)


def _variant(
    method: str, pattern: str, sparsity: float | None, convention: str, quota: str, allocation: str
) -> Variant:
    """Return the variant, with "own" replaced by the method's convention, allocation and quota."""
    if quota not in QUOTAS:
        raise RecipeError(unknown("quota", quota, QUOTAS))
    if pattern != "unstructured":
        quota = "matrix"  # N:M has none
    elif quota == "own":
        quota = "row" if method.partition(":")[0] in BY_ROW and allocation != "rows" else "matrix"
    if allocation == "own":
        asked = {"pattern": pattern, "sparsity": sparsity, "quota": quota}
        allocation = make_recipe(model="", **_method(method), **asked).allocation
    if convention not in ("own", *CONVENTIONS):
        raise RecipeError(unknown("convention", convention, ["own", *CONVENTIONS]))
    convention = _own(method) if convention == "own" else convention
    return Variant(method, pattern, sparsity, convention, quota, allocation)


def _method(text: str) -> dict[str, Any]:
    name, *pairs = text.split(":")
    kinds = {"method": METHODS, "quantizer": QUANTIZERS, "solver": SOLVERS}
    kind = next((kind for kind, names in kinds.items() if name in names), None)
    if kind is None:
        raise RecipeError(unknown("method", name, (*METHODS, *SOLVERS, *QUANTIZERS)))
    settings: dict[str, Any] = {"method": "convex", kind: name}
    further = "quantizer_args" if kind == "quantizer" else "method_args"
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"{text!r}: a setting of a method reads name=value, as in sparsegpt:damping=0.1.")
        place = settings if key in OF_RECIPE else settings.setdefault(further, {})
        place[key] = from_yaml(value)
    if kind == "quantizer" and not {"quantize", "bits"} & settings.keys():
        raise RecipeError(f"{text!r}: a quantizer needs a number of bits, as in {name}:quantize=int4 or {name}:bits=3.")
    return settings


def _without_own(text: str) -> tuple[str, dict[str, list[str]]]:
    """Split a method's text from the convention, the allocation and the quota that it names."""
    pairs = [(part, *part.partition("=")) for part in text.split(":")]
    own = {key: [value] for _, key, _, value in pairs if key in ("convention", "allocation", "quota")}
    return ":".join(part for part, key, *_ in pairs if key not in own), own


def _own(method: str) -> str:
    """Return the convention of the method's paper; for ours, of the recipe's defaults."""
    if own := OWN.get(method.partition(":")[0]):
        return own
    recipe = make_recipe(model="")
    default = recipe.prefix, recipe.error_correction, recipe.error_target
    return next(name for name, value in CONVENTIONS.items() if value == default)


def layer_settings(model: HuggingFaceModel, variants: Sequence[Variant]) -> dict[str, LayerSettings]:
    """Return layer settings by variant. After a removal only operators that read the removed parts are pruned."""
    settings = {variant.name: variant.layer_settings() for variant in variants}
    patterns = {name: each.pattern for name, each in settings.items()}
    if narrows := [pattern for pattern in patterns.values() if pattern.removes]:
        if len({pattern.removes for pattern in patterns.values()}) > 1:
            raise RecipeError(f"Pattern {str(narrows[0])!r} has its own operators: compare it with no other pattern.")
        found = {pattern: find_removal(model, pattern) for pattern in dict.fromkeys(narrows)}
        found[narrows[0]].choose(model)
        settings = {name: replace(each, patterns=found[patterns[name]].patterns) for name, each in settings.items()}
    _check(model, settings.values())
    return settings


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
