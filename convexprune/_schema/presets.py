"""Presets: a few settings of a recipe for an intention. What is given beside a preset counts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from convexprune.errors import RecipeError, unknown


class Preset(NamedTuple):
    """Settings of an intention, by what a run does."""

    all: Mapping[str, Any] = {}
    zeros: Mapping[str, Any] = {}  # of a pattern without a structure, or N:M
    unstructured: Mapping[str, Any] = {}
    codes: Mapping[str, Any] = {}
    own_codes: Mapping[str, Any] = {}  # by our quantizer
    cost: str = ""  # measured, in words

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that apply to a run with the `given` settings."""
        sparse = given.get("sparsity") != 0 and not makes_types(given)
        codes = makes_types(given) or given.get("quantize") is not None
        pattern = str(given.get("pattern", "unstructured"))
        whole = sparse and pattern == "unstructured" and given.get("quota", "matrix") == "matrix"
        zeros = sparse and (pattern == "unstructured" or (":" in pattern and pattern[0].isdigit()))
        found = {**self.all, **(self.zeros if zeros else {}), **(self.unstructured if whole else {})}
        ours = codes and given.get("quantizer", "descent") == "descent"
        return {**found, **(self.codes if codes else {}), **(self.own_codes if ours else {})}


LAYOUTS = ("gguf", "compressed-tensors")  # the keys of `convexprune.constraints.FAMILIES`, which is a floor above


def makes_types(given: Mapping[str, Any]) -> bool:
    """Return whether a run chooses a type for each operator, by a size."""
    return given.get("target") is not None or given.get("quantize") in LAYOUTS


PUBLISHED = {"method": "fistapruner", "prefix": "dense", "error_correction": 1.0, "error_target": "operator"}
PRESETS = {
    "best": Preset(
        zeros={"prefix": "pruned"},
        unstructured={"allocation": "half-curve"},
        codes={"prefix": "pruned", "token_weights": "loss"},
        cost="SmolLM2-135M at 50 %: perplexity 29.4 in place of 30.9, in 1.7 times the time of balanced",
    ),
    "balanced": Preset(cost="SmolLM2-135M at 50 %: perplexity 30.9, dense 23.3"),
    "fast": Preset(
        {"num_calibration_samples": 32, "bound_rows": 0},
        zeros={"method": "sparsegpt"},
        own_codes={"quantizer_args": {"beam": 1}},
    ),
    "fistapruner": Preset(PUBLISHED),
}


def intended(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the preset of a run has for such a run."""
    return PRESETS.get(str(given.get("preset")), Preset()).settings(given)


def require_preset(name: str | None, settings: Mapping[str, Any]) -> None:
    """Refuse an unknown preset, and settings beside `fistapruner` that are not those published."""
    if name is not None and name not in PRESETS:
        raise RecipeError(unknown("preset", name, PRESETS))
    for setting, value in PUBLISHED.items() if name == "fistapruner" else ():
        if settings[setting] != value:
            raise RecipeError(
                f"preset='fistapruner' is the algorithm as published, with {setting}={value!r}, not "
                f"{settings[setting]!r}. Leave {setting} out, or take method='fistapruner', which has it as asked."
            )


def deviations(name: str | None, settings: Mapping[str, Any]) -> str | None:
    """Say which settings are not those of a preset, because they were given; or that it has none for such a run."""
    preset = PRESETS.get(name or "balanced", Preset())
    wanted = preset.settings(settings)
    if any(preset[:-1]) and not wanted:
        return f"preset={name!r} changes nothing here: it has settings for other runs only (docs/choose.md)."
    others = [f"{n}={settings[n]!r}, not {value!r}" for n, value in wanted.items() if settings[n] != value]
    return f"preset={name!r} with settings that were given: {'; '.join(others)}." if others else None
