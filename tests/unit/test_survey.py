"""What is surveyed is what pruning costs, and what is allocated has the zeros that were asked for."""

import json
from math import ceil, exp
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from layer_contexts import context_of, pruned
from runs import on_reports

import convexprune
from convexprune._layerwise.allocation import SURVEYED, Unit, allocate_by_rule, candidates
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.steps import survey as module
from convexprune._layerwise.steps.survey import alike, by_size, survey
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters import _allocating as allocating
from convexprune.adapters._gradients import loss_fisher
from convexprune.constraints import Columns, SemiStructured, Unstructured, parse_pattern
from convexprune.errors import OutputError, RecipeError
from convexprune.pruners import Convex, Magnitude
from convexprune.recipe import make_recipe
from convexprune.report import Report
from convexprune.validation import compare, verify
from convexprune.validation._variants import make_variants

TOKENS = torch.randint(2, 4000, (5, 24), generator=torch.Generator().manual_seed(0))
HALF, TWO_OF_FOUR = Unstructured(0.5), SemiStructured(2, 4)


def surveyed(model: HuggingFaceModel) -> list[Unit]:
    fisher = loss_fisher(model, TOKENS[:4]).outputs
    return survey(model, TOKENS.split(1), 1, [*candidates(HALF), *candidates(TWO_OF_FOUR)], fisher)


def test_costs_grow_with_the_zeros_and_nothing_is_written(tiny_llama: HuggingFaceModel):
    before = [p.clone() for p in tiny_llama.model.parameters()]
    units = surveyed(tiny_llama)
    operators = [(f"{la.name}.{o.name}", o.shape[0] * o.shape[1]) for la in tiny_llama.layers for o in la.operators]
    assert sorted((unit.name, unit.size) for unit in units) == sorted(operators)
    for unit in units:
        for asked in (HALF, TWO_OF_FOUR):
            costs = [unit.costs[pattern] for pattern in candidates(asked)]
            assert costs == sorted(costs) and costs[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_llama.model.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["curve", "half-curve", "owl", "skewness"])
def test_the_zeros_on_the_whole_are_those_asked_for(tiny_llama: HuggingFaceModel, rule: Any):
    units = surveyed(tiny_llama)
    for asked in [HALF] if rule != "curve" else [HALF, TWO_OF_FOUR]:
        found = allocate_by_rule(units, rule, asked)
        patterns = found.patterns(asked)
        exact = rule != "half-curve" and asked is HALF
        assert (found.gap is not None) == (rule in SURVEYED) and (not exact or (found.gap or 0) <= 1e-9)
        operators = {f"{la.name}.{o.name}": o.shape for la in tiny_llama.layers for o in la.operators}
        assert patterns.keys() == operators.keys() and len(set(patterns.values())) > 1
        zeros = sum(patterns[name].zeros(*shape) for name, shape in operators.items())
        total = sum(m * n for m, n in operators.values())
        assert zeros / total == pytest.approx(0.5, abs=1e-3 if asked is HALF else 1e-12)
    assert allocate_by_rule(units, "uniform", HALF).patterns(HALF) == {}


def test_layers_whose_weights_are_skewed_keep_more(tiny_llama: HuggingFaceModel):
    with torch.no_grad():  # a tenth of the weights of one layer's operators are twice as large
        for operator in tiny_llama.layers[1].operators:
            operator.write(operator.read() * (1 + (torch.arange(operator.shape[1]) % 10 == 0)))
    units = {unit.name: unit.skewness for unit in surveyed(tiny_llama)}
    shares, skewness = allocate_by_rule(surveyed(tiny_llama), "skewness", HALF).shares, list[float]()
    for layer in tiny_llama.layers:
        sizes = torch.cat([operator.read().abs().flatten() for operator in layer.operators]).double()
        skewness.append(((sizes - sizes.mean()) / sizes.std(correction=0)).pow(3).mean().item())
        for operator in layer.operators:
            assert units[f"{layer.name}.{operator.name}"] == pytest.approx(skewness[-1])
    first, second = (1 - shares[f"{layer.name}.mlp.up_proj"] for layer in tiny_llama.layers)
    assert second / first == pytest.approx(exp(skewness[1] - skewness[0]), rel=1e-4)
    assert second > first


def test_half_a_curve_is_half_of_the_way_and_its_gap_reaches_to_the_best(tiny_llama: HuggingFaceModel):
    units = surveyed(tiny_llama)
    whole, half = allocate_by_rule(units, "curve", HALF), allocate_by_rule(units, "half-curve", HALF)
    assert half.shares == {name: pytest.approx(0.25 + share / 2, abs=1e-6) for name, share in whole.shares.items()}
    assert whole.cost is not None and half.cost is not None and half.gap is not None
    uniform = sum(unit.costs[HALF] for unit in units)
    assert whole.cost < half.cost < uniform and half.cost <= (whole.cost + uniform) / 2 + 1e-12
    assert half.gap == pytest.approx(half.cost - whole.cost, abs=1e-9)


CURVE = [("curve", LayerSettings(Magnitude(), HALF))]


def test_curves_are_of_the_first_windows(tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocating, "WINDOWS", 3)
    few, many = (allocating.allocate_each(tiny_llama, TOKENS[:n], TOKENS[4:], CURVE) for n in (3, 4))
    assert few == many


def test_gradients_are_of_the_first_windows_of_those(tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocating, "GRADIENTS", 2)
    few = allocating.allocate_each(tiny_llama, TOKENS[:4], TOKENS[4:], CURVE)
    seen: list[int] = []

    def first_two(model, tokens, *args):
        seen.append(len(tokens))
        return loss_fisher(model, tokens[:2], *args)

    monkeypatch.setattr(allocating, "GRADIENTS", 4)
    monkeypatch.setattr(allocating, "loss_fisher", first_two)
    assert few == allocating.allocate_each(tiny_llama, TOKENS[:4], TOKENS[4:], CURVE) and seen == [4]


@torch.no_grad()
def test_what_is_asked_beside_a_rule_changes_nothing_of_it(
    tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch
):
    """As `compare` asks: columns have gradients on more windows than rows."""
    monkeypatch.setattr(allocating, "GRADIENTS", 2)
    asked = [("columns", LayerSettings(Convex(), Columns(0.25))), ("rows", LayerSettings(Convex(), HALF)), *CURVE]
    together = allocating.allocate_each(tiny_llama, TOKENS[:4], TOKENS[4:], asked)
    assert together == [allocating.allocate_each(tiny_llama, TOKENS[:4], TOKENS[4:], [each])[0] for each in asked]
    assert together[0].columns and together[1].row_weights


def test_compare_prunes_to_the_allocation(tiny_llama: HuggingFaceModel, tmp_path: Path):
    tiny_llama.model.save_pretrained(tmp_path / "model")
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    result = compare(
        tmp_path / "model", ["wanda"], [0.5], ["unstructured"], ["dense"], tmp_path / "out", plots=False,
        allocations=["uniform", "curve"], quota="matrix", dataset=TOKENS, num_calibration_samples=4, held_out_samples=1,
        eval_texts=[str(tmp_path / "text.txt")], eval_window=16, eval_windows=2,
    )  # fmt: skip
    uniform, curve = result["rows"]
    assert (uniform["allocation"], curve["allocation"]) == ("uniform", "curve")
    assert uniform["sparsity"] == 0.5 and curve["sparsity"] == pytest.approx(0.5, abs=1e-3)
    shares = {round(o["zeros"] / (o["outputs"] * o["inputs"]), 3) for o in curve["operators"]}
    assert len(shares) > 1 and {o["zeros"] / (o["outputs"] * o["inputs"]) for o in uniform["operators"]} == {0.5}
    assert "wanda, curve" in (tmp_path / "out" / "report.md").read_text()


def test_what_cannot_be_allocated_is_refused():
    with pytest.raises(RecipeError, match="needs pattern unstructured"):
        make_variants(["wanda"], [0.5], ["2:4"], ["own"], allocations=["owl"])
    for pattern in ("unstructured", "1:2", "channels"):
        with pytest.raises(RecipeError, match="chooses an N of N:M, bits or types for every operator"):
            make_variants(["wanda"], [0.5], [pattern], ["own"], allocations=["measured"])
    with pytest.raises(RecipeError, match="for N:M there are 'uniform', 'curve' and 'measured'"):
        make_variants(["wanda"], [0.5], ["2:4"], ["own"], allocations=["half-curve"])
    with pytest.raises(RecipeError, match="Did you mean 'owl'"):
        make_variants(["wanda"], [0.5], ["2:4"], ["own"], allocations=["owls"])
    for rule in ("skewness", "rows"):
        with pytest.raises(RecipeError, match="needs pattern unstructured, not 2:4"):
            convexprune.prune(allocation=rule, pattern="2:4")
    with pytest.raises(RecipeError, match="quota='row' each has its own"):
        convexprune.prune(allocation="rows", quota="row")


def test_operators_with_one_input_differ_in_their_shares_and_none_is_touched_for_nothing(tiny_llama: HuggingFaceModel):
    layer = tiny_llama.layers[0]
    asked = {"self_attn.q_proj": 0.0, "self_attn.k_proj": 0.7, "mlp.up_proj": 0.25}
    patterns = {f"{layer.name}.{name}": Unstructured(share) for name, share in asked.items()}
    before = {operator.name: operator.read().clone() for operator in layer.operators}
    reports = pruned(context_of(tiny_llama, TOKENS), LayerSettings(Convex(), HALF, patterns=patterns))
    zeros = {operator.name: int((operator.read() == 0).sum()) for operator in layer.operators}
    assert zeros == {name: round(asked.get(name, 0.5) * weight.numel()) for name, weight in before.items()}
    assert [o.pattern for o in reports] == [str(patterns.get(o.name, HALF)) for o in reports]
    same = {o.name for o in layer.operators if torch.equal(o.read(), before[o.name])}
    assert same == {"self_attn.q_proj"}
    (idle,) = (o for o in reports if o.name.endswith("q_proj"))
    assert idle.relative_error == 0 and idle.zeros == idle.expected_zeros == 0


def shares(report: Report) -> dict[str, float]:
    return {o.name: o.expected_zeros / (o.outputs * o.inputs) for o in report.operators}


SETTINGS: dict[str, Any] = {
    "method": "sparsegpt", "dataset": TOKENS, "num_calibration_samples": 4, "held_out_samples": 1, "threads": 1,
    "bound_rows": 0,
}  # fmt: skip


@pytest.mark.parametrize("rule", ["curve", "half-curve", "owl"])
def test_prune_spreads_the_zeros_in_memory_and_in_a_folder_alike(tiny_llama: HuggingFaceModel, tmp_path, rule: str):
    dense = tmp_path / "dense"
    tiny_llama.model.save_pretrained(dense, max_shard_size="40KB")
    here = convexprune.prune(tiny_llama.model, allocation=rule, **SETTINGS).report
    there = convexprune.prune(dense, allocation=rule, output_dir=tmp_path / "out", **SETTINGS).report
    assert there.environment["loading"] == "layer by layer"
    assert shares(here) == shares(there) and len(set(shares(here).values())) > 1
    assert here.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(o.zeros == o.expected_zeros for o in there.operators)
    assert len({o.pattern for o in there.operators}) > 1 and all("per matrix" in o.pattern for o in there.operators)
    assert (there.allocation["gap"] is not None) == (rule in SURVEYED) and there.allocation == here.allocation
    recipe = make_recipe(**(there.recipe | {"model": "", "allocation": rule}))
    patterns = {o.name: parse_pattern(o.pattern) for o in there.operators}  # `verify` judges by what each was asked
    judged = recipe.layer_settings(patterns=patterns)
    assert all(judged.pattern_of(o.name).zeros(o.outputs, o.inputs) == o.expected_zeros for o in there.operators)
    with pytest.raises(RecipeError, match="verify the folder"):
        verify(dense, dataset=str(tmp_path), allocation=rule)


@pytest.mark.parametrize("asked", [{}, {"quota": "row"}, {"pattern": "2:4"}])
def test_quotas_of_matrices_of_rows_and_of_groups_are_allocated_and_bounded(
    tiny_llama: HuggingFaceModel, asked: dict[str, Any]
):
    report = convexprune.prune(
        tiny_llama.model, allocation="curve", **asked, **SETTINGS | dict[str, Any](bound_rows=2)
    ).report
    assert len({o.pattern for o in report.operators}) > 1
    assert all(o.zeros == o.expected_zeros for o in report.operators)
    assert all(o.bound is not None and o.bound["lower"] <= o.bound["error"] for o in report.operators)


def test_a_run_goes_on_with_the_allocation_that_it_began_with(tiny_llama: HuggingFaceModel, tmp_path, monkeypatch):
    dense = tmp_path / "dense"
    tiny_llama.model.save_pretrained(dense)

    def stop(_):
        raise KeyboardInterrupt

    settings: dict[str, Any] = {"allocation": "owl", "output_dir": tmp_path / "out", **SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, on_progress=on_reports(stop), **settings)
    began = json.loads((tmp_path / ".out.part" / "work" / "allocation.json").read_text())["notes"]["shares"]
    with pytest.raises(OutputError, match="differs in recipe"):
        convexprune.prune(dense, resume=True, **{**settings, "allocation": "skewness"})
    monkeypatch.setattr(allocating, "survey", stop)
    report = convexprune.prune(dense, resume=True, **settings).report
    assert shares(report) == pytest.approx(began, abs=1e-3)


@pytest.mark.parametrize(("rows", "most"), [(5, 8), (8, 8), (9, 8), (100, 7), (3, 1)])
def test_few_rows_speak_for_rows_of_like_loss(rows: int, most: int):
    losses = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
    like = alike(losses, most)
    assert len(like.unique()) == min(rows, most) and like[like].equal(like)
    assert rows > most or like.tolist() == list(range(rows))
    ranks = losses.argsort().argsort()
    assert int((ranks - ranks[like]).abs().max()) <= ceil(rows / min(rows, most)) // 2  # half a part of equal parts


def test_errors_of_pruned_rows_stay_and_others_are_in_proportion():
    """Row 1 has no energy on calibration tokens, and an error on others."""
    like, sizes = torch.tensor([0, 1, 0, 1]), torch.tensor([2.0, 0.0, 4.0, 8.0])
    errors = by_size(torch.tensor([3.0, 5.0]), like.unique(), like, sizes)
    assert errors.tolist() == [3.0, 5.0, 6.0, 0.0]


def test_few_rows_give_the_costs_of_all(tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch):
    whole = {unit.name: unit.costs for unit in surveyed(tiny_llama)}
    monkeypatch.setattr(module, "ROWS", 8)
    few = {unit.name: unit.costs for unit in surveyed(tiny_llama)}
    ratios = [few[name][each] / cost for name, costs in whole.items() for each, cost in costs.items() if cost]
    assert 0.5 < min(ratios) < 1 < max(ratios) < 2 and 0.9 < fmean(ratios) < 1.1
