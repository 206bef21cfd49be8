"""The door, end to end: what comes out is exactly what was asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from door import SMALL, TOKENS, state
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import convexprune
from convexprune.adapters import HuggingFaceModel
from convexprune.core._penalty import L1
from convexprune.pruners import PRUNERS, AbstractPruner, Convex, LayerEdit
from convexprune.recipe import Recipe
from convexprune.solvers import AbstractSolver
from convexprune.solvers._fista import FISTA


def operator_names(model: HuggingFaceModel) -> set[str]:
    return {f"{layer.name}.{operator.name}.weight" for layer in model.layers for operator in layer.operators}


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


@pytest.mark.parametrize("method", ["convex", "admm", "fistapruner"])
def test_columns_are_removed_in_all_rows(tiny_opt: HuggingFaceModel, method: str):
    report = convexprune.prune(tiny_opt.model, pattern="columns", sparsity=0.25, method=method, **SMALL).report
    weights = state(tiny_opt)
    for o in report.operators:
        weight = weights[f"{o.name}.weight"]
        assert int((weight == 0).all(0).sum()) == o.inputs // 4
        assert o.zeros == o.expected_zeros == weight.numel() // 4 and o.pattern == "columns 25%" and o.bound is None


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
    assert all(
        o.solves == Convex().envelopes + 1 and o.gap is not None and o.largest_gap is not None for o in report.operators
    )
    assert report.largest_gap is not None and report.largest_gap < 1e-2


def test_error_correction_feeds_each_stage_with_what_the_pruned_stages_make(tiny_llama: HuggingFaceModel, monkeypatch):
    """The moments a pruner gets for `o_proj` are those of the layer with q, k, v pruned against the dense layer."""
    import copy

    from convexprune._layerwise import capture, pipeline

    seen = {}

    def halve(_, stacks, began):
        for stack in stacks:
            first = stack.group.operators[0]
            seen[first.name] = stack.statistics.total
            first.write(first.read() / 2)

    monkeypatch.setattr(pipeline, "run_steps", halve)
    dense = copy.deepcopy(tiny_llama)
    convexprune.prune(tiny_llama.model, **SMALL, error_target="operator")
    layer, call, hidden = dense.layers[-1], dense.calls(TOKENS[:1])[-1], None
    hidden = [dense.first_inputs(TOKENS[i : i + 1]) for i in range(6)]
    first_call = dense.calls(TOKENS[:1])[0]
    hidden = [first_call(dense.layers[0].module, h) for h in hidden]
    (group,) = layer.stages[1]
    x = torch.cat([capture.stage_inputs(layer, [group], call, h)[group][0] for h in hidden])
    layer.operators[0].write(layer.operators[0].read() / 2)
    y = torch.cat([capture.stage_inputs(layer, [group], call, h)[group][0] for h in hidden])
    moments = seen["self_attn.o_proj"]
    torch.testing.assert_close(moments.gram, y.T @ y / len(y))
    torch.testing.assert_close(moments.cross, (x - y).T @ y / len(y), atol=1e-6, rtol=1e-4)
    assert seen["self_attn.q_proj"].cross is None


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "fistapruner"])
def test_a_refit_is_added_to_a_method_that_has_none(build, method: str):
    plain, refitted = (convexprune.prune(build("opt"), method=method, refit=r, **SMALL).report for r in (None, True))
    first = [report.operators[0] for report in (plain, refitted)]
    assert first[1].gap is not None and first[1].gap <= 1e-4 and first[1].status == "SOLVED"
    assert first[1].solves == first[0].solves + 1
    assert first[1].relative_error < 0.95 * first[0].relative_error


@pytest.mark.parametrize("method", ["convex", "admm", "alps"])
def test_a_refit_is_taken_from_a_method_that_has_one(build, method: str):
    plain, bare = (convexprune.prune(build("opt"), method=method, refit=r, **SMALL).report for r in (True, False))
    first = [report.operators[0] for report in (plain, bare)]
    assert first[1].solves == first[0].solves - 1
    assert first[0].zeros == first[1].zeros == 512


def test_held_out_windows_judge_and_change_nothing(build):
    weights, errors_of = [], []
    for held_out in (0, 2):
        model = build("llama")
        settings: dict[str, Any] = SMALL | {"num_calibration_samples": 4, "held_out_samples": held_out}
        report = convexprune.prune(model, **settings).report
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        errors_of.append([o.held_out_error for o in report.operators])
        assert {o.held_out_tokens for o in report.operators} == {24 * held_out}
    assert torch.equal(*weights)
    assert errors_of[0] == [None] * 14 and all(e > 0 for e in errors_of[1])


def test_the_held_out_error_is_the_error_on_those_windows(build, tokenizer):
    model = HuggingFaceModel(build("llama"), tokenizer)
    name, q = "model.layers.0.self_attn.q_proj", model.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(q, nn.Linear)
    windows, dense = [], q.weight.clone()
    watch = q.register_forward_pre_hook(lambda _, args: windows.append(args[0]))
    settings: dict[str, Any] = SMALL | {"num_calibration_samples": 4, "held_out_samples": 2}
    report = convexprune.prune(model.model, **settings).report
    watch.remove()
    x = torch.cat([w[0] for w in windows[-6:]])[-48:]  # the dense pass over 4 + 2 windows: the last two are held out
    expected = ((x @ (q.weight - dense).T).square().sum() / (x @ dense.T).square().sum()).item()
    (found,) = [o.held_out_error for o in report.operators if o.name == name]
    assert found == pytest.approx(expected, rel=1e-3)


def test_by_default_an_eighth_is_held_out_if_there_is_so_much(tiny_opt: HuggingFaceModel):
    for samples, tokens in ((5, 24), (6, 0)):
        report = convexprune.prune(
            tiny_opt.model, **SMALL | {"num_calibration_samples": samples, "sparsity": 0.1}
        ).report
        assert {o.held_out_tokens for o in report.operators} == {tokens}


def test_a_pruned_prefix_feeds_each_layer_with_what_the_pruned_layers_make(tiny_llama: HuggingFaceModel, monkeypatch):
    from convexprune._layerwise import pipeline

    seen = {}

    def halve(_, stacks, began):
        for stack in stacks:
            seen[stack.names[0]] = stack.statistics.total
            for operator in stack.group.operators:
                operator.write(operator.read() / 2)

    def inputs(name):
        kept = []
        hook = tiny_llama.model.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        with torch.no_grad():
            tiny_llama.model(TOKENS)
        hook.remove()
        return kept[0].flatten(0, 1)

    name = "model.layers.1.self_attn.q_proj"
    x = inputs(name)
    monkeypatch.setattr(pipeline, "run_steps", halve)
    convexprune.prune(tiny_llama.model, prefix="pruned", **SMALL)
    y = inputs(name)
    torch.testing.assert_close(seen[name].gram, y.T @ y / len(y))
    torch.testing.assert_close(seen[name].cross, (x - y).T @ y / len(y), atol=1e-6, rtol=1e-4)
    first = seen["model.layers.0.self_attn.q_proj"]
    assert first.cross is not None and not first.cross.any()  # before the first layer nothing is pruned


def test_a_kept_weight_too_small_for_the_dtype_is_stored_as_the_smallest_number(build):
    model = build("llama").to(torch.float16)
    q = model.model.layers[0].self_attn.q_proj.weight
    q.data[:, :8] *= 2e-4  # many of these round to zero once halved, and a quarter of them is kept

    class Shrink(AbstractPruner):
        def prune(self, problem):
            return LayerEdit(problem.weight * 2.0**-14, problem.pattern.mask(torch.rand(problem.weight.shape)))

    settings: dict[str, Any] = SMALL | {"targets": ["model.layers.0.self_attn.q_proj"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "build_pruner", lambda *_: Shrink())
        (report,) = convexprune.prune(model, dtype="float16", **settings).report.operators
    assert report.zeros == report.expected_zeros == 512
    assert (q.abs() == 2.0**-24).any()


def test_zeros_of_the_dense_weight_that_are_kept_are_counted_and_no_error(build):
    model = build("llama")
    model.model.layers[0].self_attn.q_proj.weight.data[:20] = 0
    report = convexprune.prune(model, method="magnitude", **SMALL).report
    assert report.operators[0].zeros == 20 * 32 > report.operators[0].expected_zeros == 512


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
        certified, advanced = 0, 0

        def step(self, problem, start, residual, certified=True):
            Mine.certified += certified
            Mine.advanced += 1
            return super().step(problem, start, residual, certified)

    report = convexprune.prune(tiny_opt.model, solver=Mine(max_iterations=3), **SMALL).report
    path = Convex()
    assert (Mine.certified, Mine.advanced) == (path.envelopes * 8, path.rounds * 8) and report.recipe[
        "solver"
    ] == "Mine"
    assert all(o.solves == path.envelopes + 1 for o in report.operators)


def test_a_users_solver_needs_only_to_solve(tiny_opt: HuggingFaceModel):
    class Plain(AbstractSolver):
        solved = 0

        @property
        def penalties(self):
            return (L1,)

        def solve(self, problem, start=None):
            Plain.solved += 1
            return FISTA(max_iterations=3, check_every=10).solve(problem, start)

    report = convexprune.prune(tiny_opt.model, solver=Plain(), method_args={"rounds": 6}, **SMALL).report
    assert Plain.solved == 6 * 8
    assert all(o.solves == 3 + 1 for o in report.operators)  # certified: the last of each envelope, and the refit


def test_the_ground_truth_solver_prunes_a_tiny_operator(tiny_opt: HuggingFaceModel):
    settings: dict[str, Any] = {"method_args": {"rounds": 2}, "damping": 0.5}
    targets = ["model.decoder.layers.0.self_attn.out_proj"]
    report = convexprune.prune(tiny_opt.model, solver="cvxpy", targets=targets, **settings, **SMALL).report
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
    recipe = convexprune.recipe.make_recipe(**yaml.safe_load((tmp_path / "pruned" / "recipe.yaml").read_text()))
    assert recipe.pattern == "2:4"
    report = json.loads((tmp_path / "pruned" / "report.json").read_text())
    assert report["sparsity"] == 0.5 and len(report["operators"]) == 14
    assert "lm_head" in report["left_alone"]
