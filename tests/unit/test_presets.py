"""Intentions: a preset is a few settings, what is given counts, and a run says what it takes before it begins."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SETTINGS
from test_gguf import RUN, built

import convexprune
from convexprune._schema.presets import intended
from convexprune.constraints import FAMILIES
from convexprune.errors import RecipeError
from convexprune.recipe import make_recipe


@pytest.mark.parametrize(
    ("asked", "same"),
    [
        ({"preset": "best"}, {"prefix": "pruned", "allocation": "half-curve"}),  # the bold column of README
        ({"preset": "best", "pattern": "2:4"}, {"pattern": "2:4", "prefix": "pruned"}),
        ({"preset": "best", "pattern": "channels"}, {"pattern": "channels"}),
        ({"preset": "best", "bits": 3.3, "sparsity": 0}, {"bits": 3.3, "sparsity": 0}),
        ({"preset": "best", "target": "1GB"}, {"target": "1GB", "token_weights": "loss", "prefix": "pruned"}),
        ({"preset": "balanced"}, {}),
        ({"preset": "fast"}, {"method": "sparsegpt", "num_calibration_samples": 32, "bound_rows": 0}),
        (
            {"preset": "fast", "quantize": "int4", "sparsity": 0},
            {
                "quantize": "int4",
                "sparsity": 0,
                "quantizer_args": {"beam": 1},
                "num_calibration_samples": 32,
                "bound_rows": 0,
            },
        ),
        (
            {"preset": "fast", "quantize": "int4", "sparsity": 0, "quantizer": "rtn"},
            {"quantize": "int4", "sparsity": 0, "quantizer": "rtn", "num_calibration_samples": 32, "bound_rows": 0},
        ),
        ({"preset": "fast", "method": "wanda"}, {"method": "wanda", "num_calibration_samples": 32, "bound_rows": 0}),
        ({"preset": "fast", "pattern": "heads"}, {"pattern": "heads", "num_calibration_samples": 32, "bound_rows": 0}),
    ],
)
def test_a_preset_is_a_few_settings_and_what_is_given_counts(asked: dict[str, Any], same: dict[str, Any]):
    recipe = make_recipe(**asked)
    assert recipe.model_dump() == make_recipe(**same).model_dump() | {"preset": asked["preset"]}
    assert make_recipe(**recipe.model_dump()) == recipe and make_recipe(**recipe.chosen) == recipe
    said = recipe.deviations or ""
    assert ("settings that were given" in said) == ("method" in asked)
    assert ("changes nothing here" in said) == (asked["preset"] == "best" and asked.keys() - {"preset"} == same.keys())


@pytest.mark.parametrize("quantize", FAMILIES)
def test_a_layout_chooses_types_by_a_size(quantize: str):
    assert intended({"preset": "best", "quantize": quantize}) == {"prefix": "pruned", "token_weights": "loss"}


@pytest.mark.parametrize("quantize", ["gguf", "compressed-tensors"])
def test_types_by_bits_are_named_wherever_a_run_is_to_be_repeated(quantize: str):
    recipe = make_recipe(quantize=quantize, bits=6)
    assert recipe.chosen == {"quantize": quantize, "bits": 6} and make_recipe(**recipe.chosen) == recipe
    assert make_recipe(target="1GB").chosen == {"target": make_recipe(target="1GB").target}


def test_a_setting_that_the_method_of_a_preset_does_not_take_names_the_preset():
    with pytest.raises(RecipeError, match=r"'sparsegpt', of preset 'fast', does not take it"):
        make_recipe(preset="fast", solver="admm").build_pruner()


@pytest.mark.long
def test_a_run_says_what_it_takes_and_what_it_leaves_of_the_preset(tmp_path: Path):
    source, phases = built("llama", tmp_path / "dense", torch.bfloat16), list[str]()
    settings: Any = SETTINGS | {"method": "wanda", "sparsity": 0.5, "preset": "best"}
    report = convexprune.prune(
        source, output_dir=tmp_path / "run", on_progress=lambda event: phases.append(event.phase), **settings
    ).report
    said = [phase for phase in phases if phase.startswith("forecast: ")]
    assert "s on cpu" in said[0] and "of memory" in said[0] and "29.4 in place of 30.9" in said[1]
    assert phases.index(said[0]) < phases.index("reading the weights")
    assert report.recipe["preset"] == "best" and report.recipe["prefix"] == "pruned"
    phases.clear()
    settings |= {"preset": "balanced", "bits": 3}
    convexprune.prune(source, output_dir=tmp_path / "bits", on_progress=lambda e: phases.append(e.phase), **settings)
    assert not any("measured: " in phase for phase in phases)
    settings = RUN | {"target": "2MB", "sparsity": None, "preset": "fast", "num_calibration_samples": 4}
    phases.clear()
    report = convexprune.prune(
        source, output_dir=tmp_path / "sized", on_progress=lambda event: phases.append(event.phase), **settings
    ).report
    said = [phase for phase in phases if phase.startswith("forecast: ")]
    assert "bits a weight of the whole file" in said[1] and "Yours is not known" in said[1]
    assert "nats a token for these types" in said[2]
    assert any("num_calibration_samples=4, not 32" in warning for warning in report.warnings)
