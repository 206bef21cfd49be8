"""The door, end to end: what comes out is exactly what was asked, or nothing comes out."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import convexprune
from convexprune import errors
from convexprune.adapters import EMBEDDED, HuggingFaceModel
from convexprune.pipeline import whole_folder
from convexprune.pruners import PRUNERS
from convexprune.solvers.fista import FISTA

TOKENS = torch.randint(2, 4000, (6, 24), generator=torch.Generator().manual_seed(0))
SMALL = {"dataset": TOKENS, "num_calibration_samples": 6}


def state(model: HuggingFaceModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def operator_names(model: HuggingFaceModel) -> set[str]:
    return {f"{layer.name}.{name}.weight" for layer in model.layers for stage in layer.stages for name in stage}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_operator_of_every_model_has_the_exact_count(tiny: HuggingFaceModel, pattern: str):
    result = convexprune.prune(tiny.model, pattern=pattern, **SMALL)
    assert len(result.report.operators) == len(operator_names(tiny))
    weights = state(tiny)
    for o in result.report.operators:
        weight = weights[f"{o.name}.weight"]
        assert not torch.signbit(weight[weight == 0]).any()
        assert int((weight == 0).sum()) == o.zeros == o.expected_zeros == weight.numel() // 2
        if pattern == "2:4":
            assert ((weight.view(weight.shape[0], -1, 4) != 0).sum(-1) == 2).all()


@pytest.mark.parametrize("method", [*PRUNERS, "preset"])
def test_every_method_prunes_and_leaves_all_else_untouched(tiny_llama: HuggingFaceModel, method: str):
    before = state(tiny_llama)
    settings = {"preset": "fistapruner"} if method == "preset" else {"method": method}
    result = convexprune.prune(tiny_llama.model, sparsity=0.3, **settings, **SMALL)
    changed = {n for n, p in tiny_llama.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == operator_names(tiny_llama)
    assert all(o.zeros == round(0.3 * o.outputs * o.inputs) for o in result.report.operators)


@pytest.mark.parametrize("method", PRUNERS)
def test_sparsity_zero_changes_nothing_bit_for_bit(tiny_opt: HuggingFaceModel, method: str):
    before = state(tiny_opt)
    convexprune.prune(tiny_opt.model, method=method, sparsity=0.0, **SMALL)
    assert all(torch.equal(p, before[n]) for n, p in tiny_opt.model.named_parameters())


def test_every_convex_solve_carries_a_certificate(tiny_llama: HuggingFaceModel):
    report = convexprune.prune(tiny_llama.model, **SMALL).report
    assert all(o.solves == 41 and o.gap is not None and o.largest_gap is not None for o in report.operators)
    assert report.largest_gap is not None and report.largest_gap < 1e-2


def test_error_correction_feeds_each_stage_with_what_the_pruned_stages_make(tiny_llama: HuggingFaceModel, monkeypatch):
    """The moments a pruner gets for `o_proj` are those of the layer with q, k, v pruned against the dense layer."""
    import copy

    from convexprune.pipeline import layer as room

    seen = {}
    monkeypatch.setattr(room, "_prune_stage", lambda layer, names, folds, *_: (
        seen.__setitem__(names[0], folds[0] + folds[1]), layer.operator(names[0]).weight.mul_(0.5)))  # fmt: skip
    dense = copy.deepcopy(tiny_llama)
    convexprune.prune(tiny_llama.model, **SMALL)
    layer, call, hidden = dense.layers[-1], dense.calls(TOKENS[:1])[-1], None
    hidden = [dense.first_inputs(TOKENS[i : i + 1]) for i in range(6)]
    first_call = dense.calls(TOKENS[:1])[0]
    hidden = [first_call(dense.layers[0].module, h) for h in hidden]
    pruned = copy.deepcopy(layer.module)
    pruned.get_parameter("self_attn.q_proj.weight").mul_(0.5)
    x = torch.cat([room.operator_input(layer.module, "self_attn.o_proj", call, h)[0] for h in hidden])
    y = torch.cat([room.operator_input(pruned, "self_attn.o_proj", call, h)[0] for h in hidden])
    moments = seen["self_attn.o_proj"]
    torch.testing.assert_close(moments.gram, y.T @ y / len(y))
    torch.testing.assert_close(moments.cross, (x - y).T @ y / len(y), atol=1e-6, rtol=1e-4)
    assert seen["self_attn.q_proj"].cross is None


def test_correction_lowers_the_error_of_the_layer_output(build, tokenizer):
    outputs = {}
    for correction in (None, 0.0, 1.0):
        model = HuggingFaceModel(build("llama"), tokenizer)
        if correction is not None:
            convexprune.prune(model.model, error_correction=correction, damping=0.01, **SMALL)
        call, hidden = model.calls(TOKENS)[0], model.first_inputs(TOKENS)
        outputs[correction] = call(model.layers[0].module, hidden)
    error = {c: float((outputs[c] - outputs[None]).square().mean()) for c in (0.0, 1.0)}
    assert error[1.0] < error[0.0]


def test_batch_size_hardly_changes_the_result(build):
    weights = []
    for batch_size in (1, 4):
        model = build("opt")
        convexprune.prune(model, batch_size=batch_size, **SMALL)
        weights.append(model.model.decoder.layers[1].fc2.weight)
    agreement = ((weights[0] == 0) == (weights[1] == 0)).float().mean()
    assert agreement > 0.99  # sums in another order move a few ties


def test_a_users_own_solver_is_used_and_named(tiny_opt: HuggingFaceModel):
    class Mine(FISTA):
        solved = 0

        def solve(self, problem, start=None):
            Mine.solved += 1
            return super().solve(problem, start)

    report = convexprune.prune(tiny_opt.model, solver=Mine(max_iterations=3), **SMALL).report
    assert Mine.solved == 20 * 8 and report.recipe["solver"] == "Mine"


def test_the_ground_truth_solver_prunes_a_tiny_operator(tiny_opt: HuggingFaceModel):
    settings = {"rounds": 2}
    targets = ["model.decoder.layers.0.self_attn.out_proj"]
    report = convexprune.prune(tiny_opt.model, solver="cvxpy", targets=targets, method_args=settings, **SMALL).report
    assert report.operators[0].zeros == 512
    assert (
        report.operators[0].largest_gap is not None and report.operators[0].largest_gap < 1e-5
    )  # the answer is stored in float32


def test_the_output_is_an_ordinary_folder_that_transformers_loads(tiny_llama: HuggingFaceModel, tmp_path: Path):
    tiny_llama.model.save_pretrained(tmp_path / "dense")
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained(tmp_path / "dense")
    result = convexprune.prune(tmp_path / "dense", pattern="2:4", output_dir=tmp_path / "pruned", **SMALL)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, result.model(TOKENS).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "pruned")) > 0
    recipe = convexprune.pipeline.make_recipe(**yaml.safe_load((tmp_path / "pruned" / "recipe.yaml").read_text()))
    assert recipe.pattern == "2:4"
    report = json.loads((tmp_path / "pruned" / "report.json").read_text())
    assert report["sparsity"] == 0.5 and len(report["operators"]) == 14
    assert "lm_head" in report["left_alone"]


def test_the_bundled_model_is_pruned_with_little_loss_on_text_that_it_samples(tmp_path: Path):
    result = convexprune.prune(num_calibration_samples=16, evaluation="self", output_dir=tmp_path / "out")
    dense, pruned = (result.report.perplexity[name]["value"] for name in ("dense", "pruned"))
    assert result.report.sparsity == 0.5
    assert dense < pruned < 1.10 * dense
    assert result.report.largest_gap is not None and result.report.largest_gap < 1e-3


BAD = {
    "sparsity": ({"sparsity": 1.0}, errors.PatternError, r"1.0 is outside \[0, 1\)"),
    "vanishing sparsity": ({"sparsity": 1e-9}, errors.PatternError, "q_proj.* rounds to 0 zeros"),
    "pattern name": ({"pattern": "two to four"}, errors.PatternError, "Unknown pattern"),
    "pattern against sparsity": ({"pattern": "1:4", "sparsity": 0.5}, errors.PatternError, "has sparsity 0.75"),
    "pattern width": ({"pattern": "3:7"}, errors.PatternError, r"q_proj: .*no multiple of 7"),
    "solver": ({"solver": "fsta"}, errors.RecipeError, "Did you mean 'fista'"),
    "solver without L1": ({"solver": "cg"}, errors.UnsupportedError, "does not take the penalty L1; it takes: Support"),
    "method": ({"method": "wando"}, errors.RecipeError, "Did you mean 'wanda'"),
    "preset": ({"preset": "fistaprune"}, errors.RecipeError, "Did you mean 'fistapruner'"),
    "damping of another method": ({"method": "wanda", "damping": 0.1}, errors.RecipeError, "does not take it"),
    "damping of a preset": ({"preset": "fistapruner", "damping": 0.1}, errors.RecipeError, "does not take it"),
    "preset and method": ({"preset": "fistapruner", "method": "wanda"}, errors.RecipeError, "names its own method"),
    "method settings": ({"method_args": {"round": 3}}, errors.RecipeError, "do not fit the method 'convex'"),
    "quota": ({"quota": "column"}, errors.RecipeError, "quota='column'"),
    "error_correction": ({"error_correction": 2.0}, errors.RecipeError, "error_correction=2.0"),
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
        tiny_opt.model.model.decoder.layers[1].fc1.weight.mul_(1e38)
    with pytest.raises(errors.ModelError, match=r"input of model\.decoder\.layers\.1\.fc2 is not finite"):
        convexprune.prune(tiny_opt.model, **SMALL)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(RuntimeError, match="half way"), whole_folder(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
    assert (tmp_path / "out" / "part").read_text() == "x"


def test_the_embedded_default_is_the_bundled_model():
    assert (EMBEDDED / "model.safetensors").is_file()
