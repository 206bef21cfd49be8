"""What `prune` refuses: bad settings before any work, a folder that holds something, numbers that are not finite."""

from pathlib import Path

import pytest
import torch
from door import SMALL, TOKENS, state

import convexprune
from convexprune import errors
from convexprune.adapters import HuggingFaceModel

BAD = {
    "sparsity": ({"sparsity": 1.0}, errors.PatternError, r"1.0 is outside \[0, 1\)"),
    "vanishing sparsity": ({"sparsity": 1e-9}, errors.PatternError, "q_proj.* weights rounds to 0. Accepted: "),
    "pattern name": ({"pattern": "two to four"}, errors.PatternError, "Unknown pattern"),
    "pattern against sparsity": ({"pattern": "1:4", "sparsity": 0.5}, errors.PatternError, "has sparsity 0.75"),
    "pattern width": ({"pattern": "3:7"}, errors.PatternError, r"q_proj: .*no multiple of 7"),
    "group size of nothing": ({"group_size": 32}, errors.RecipeError, "group_size=32 belongs to quantize"),
    "quantizer of nothing": (
        {"quantizer": "gptq"},
        errors.RecipeError,
        "'gptq' belongs to quantize or bits or embedding",
    ),
    "rule that removes": (
        {"rules": [{"targets": ["o_proj"], "pattern": "heads"}]},
        errors.RecipeError,
        "Pattern 'heads' removes as much from all layers",
    ),
    "solver": ({"solver": "fsta"}, errors.RecipeError, "Did you mean 'fista'"),
    "solver without L1": (
        {"solver": "cg"},
        errors.RecipeError,
        "fixed supports only .*Known: admm, cvxpy, fista, scipy",
    ),
    "a solver as a method": ({"method": "fista"}, errors.RecipeError, "'fista' is a solver, .*--solver fista"),
    "method": ({"method": "wando"}, errors.RecipeError, "Did you mean 'wanda'"),
    "preset": ({"preset": "fistaprune"}, errors.RecipeError, "Did you mean 'fistapruner'"),
    "damping of another method": ({"method": "wanda", "damping": 0.1}, errors.RecipeError, "does not take it"),
    "damping of a preset": ({"preset": "fistapruner", "damping": 0.1}, errors.RecipeError, "does not take it"),
    "solver of another method": (
        {"solver": "cvxpy", "method": "wanda"},
        errors.RecipeError,
        "'wanda' does not take it",
    ),
    "preset and method": (
        {"preset": "fistapruner", "method": "wanda"},
        errors.RecipeError,
        "not 'wanda'. Leave method out",
    ),
    "method settings": (
        {"method": "sparsegpt", "method_args": {"dampening": 3}},
        errors.RecipeError,
        "Unknown setting of 'sparsegpt': 'dampening'. Did you mean 'damping'. Known: block, damping.",
    ),
    "settings of a quantizer": (
        {"quantize": "int4", "quantizer_args": {"beams": 3}},
        errors.RecipeError,
        "setting of 'descent'.*Did you mean 'beam'",
    ),
    "settings of no quantizer": ({"quantizer_args": {"beam": 3}}, errors.RecipeError, "belongs to quantize"),
    "settings of what has none": ({"method": "wanda", "method_args": {"block": 3}}, errors.RecipeError, "Known: none"),
    "preset and correction": (
        {"preset": "fistapruner", "error_correction": 0.5},
        errors.RecipeError,
        r"error_correction=1.0, not 0.5\. .*method='fistapruner'",
    ),
    "preset and prefix": (
        {"preset": "fistapruner", "prefix": "pruned"},
        errors.RecipeError,
        "Leave prefix out",
    ),
    "preset and error_target": (
        {"preset": "fistapruner", "error_target": "residual_stream"},
        errors.RecipeError,
        "error_target='operator'",
    ),
    "quota of N:M": ({"pattern": "2:4", "quota": "row"}, errors.PatternError, "Leave quota out"),
    "warm start": (
        {"preset": "fistapruner", "method_args": {"warm_start": "sparsgpt"}},
        errors.RecipeError,
        "warm_start='sparsgpt': Input should be 'sparsegpt' or 'wanda'",
    ),
    "a text for targets": ({"targets": "q_proj"}, errors.RecipeError, r"got the text 'q_proj'\. Write \['q_proj'\]"),
    "quota": ({"quota": "column"}, errors.RecipeError, "quota='column'"),
    "error_correction": ({"error_correction": 2.0}, errors.RecipeError, "error_correction=2.0"),
    "prefix": ({"prefix": "sparse"}, errors.RecipeError, "prefix='sparse'"),
    "too few held out": ({"held_out_samples": 1}, errors.CalibrationError, "0 windows left after 6"),
    "too few samples": ({"num_calibration_samples": 7}, errors.CalibrationError, "7"),
    "token out of range": ({"dataset": TOKENS + 4000}, errors.CalibrationError, "knows 0 to 4095"),
    "no operator": ({"targets": ["nothing"]}, errors.ModelError, "Unknown operator 'nothing'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(tiny_opt: HuggingFaceModel, tmp_path: Path, case: str):
    settings, error, message = BAD[case]
    before = state(tiny_opt)
    with pytest.raises(error, match=message):
        convexprune.prune(tiny_opt.model, **{**SMALL, **settings}, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(p, before[n]) for n, p in tiny_opt.model.named_parameters())


def test_a_module_that_is_no_model_is_refused():
    with pytest.raises(errors.ModelError, match="A value of type Linear is no model of transformers"):
        convexprune.prune(torch.nn.Linear(3, 3), **SMALL)  # pyright: ignore[reportArgumentType]


def test_a_module_without_a_truth_value_is_refused_as_well():
    class Compiled(torch.nn.Linear):  # torch.compile's wrapper raises where it is asked for its length
        def __len__(self) -> int:
            raise TypeError("does not support len()")

    with pytest.raises(errors.ModelError, match="A value of type Compiled is no model of transformers"):
        convexprune.prune(Compiled(4, 4), dataset=torch.zeros(8, 8, dtype=torch.long))  # pyright: ignore


def test_another_result_is_never_overwritten(tiny_opt: HuggingFaceModel, tmp_path: Path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(errors.OutputError, match="already holds something"):
        convexprune.prune(tiny_opt.model, output_dir=tmp_path, **SMALL)
    assert (tmp_path / "kept").read_text() == "x"


def test_a_non_finite_weight_is_named(tiny_opt: HuggingFaceModel):
    with torch.no_grad():
        tiny_opt.model.model.decoder.layers[1].fc1.weight[0, 0] = float("nan")
    with pytest.raises(errors.ModelError, match=r"layers\.1\.fc1\.weight"):
        convexprune.prune(tiny_opt.model, **SMALL)


def test_a_non_finite_activation_is_named(tiny_opt: HuggingFaceModel):
    with torch.no_grad():
        tiny_opt.model.model.decoder.layers[1].fc1.weight.mul_(1e25)
    with pytest.raises(errors.ModelError, match=r"input of model\.decoder\.layers\.1\.fc2 is not finite"):
        convexprune.prune(tiny_opt.model, allocation="uniform", **SMALL)
    with pytest.raises(errors.ModelError, match=r"gradient .* at the outputs of model\.decoder\.layers\.1\.fc2 is not"):
        convexprune.prune(tiny_opt.model, **SMALL)
