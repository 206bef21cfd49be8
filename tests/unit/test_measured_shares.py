"""Trials measure whole networks, and the allocation follows the measurement."""

from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

import convexprune
from convexprune._layerwise.allocation import Unit, further, measured
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.steps.survey import survey
from convexprune._layerwise.steps.trials import PRUNED, Trials, Weights
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._allocating import added_divergences
from convexprune.adapters._types import on_grid
from convexprune.constraints import Coded, Constraint, Quantized, SemiStructured, Unstructured, parse_pattern
from convexprune.errors import CalibrationError
from convexprune.pruners import Magnitude
from convexprune.quantizers._descent import WIDE
from convexprune.quantizers._passes import Sweep

TOKENS = torch.randint(2, 4000, (5, 24), generator=torch.Generator().manual_seed(0))
THREE_BITS = Quantized(Unstructured(0.0), Coded(3.0))
TWO_OF_FOUR, THREE_OF_FOUR, ONE_OF_FOUR = (SemiStructured(kept, 4) for kept in (2, 3, 1))


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "step"), [(TWO_OF_FOUR, ONE_OF_FOUR), (THREE_BITS, further(THREE_BITS))], ids=str)
def test_a_trial_is_the_divergence_of_a_whole_network(
    tiny_llama: HuggingFaceModel, pattern: Constraint, step: Constraint
):
    """Slow twin: copies of the model whose operators are pruned by hand, or have the weights of a survey alone."""
    names = [f"{layer.name}.{operator.name}" for layer in tiny_llama.layers for operator in layer.operators]
    before = {name: p.clone() for name, p in tiny_llama.model.named_parameters()}
    ones = {f"{y.name}.{o.name}": torch.ones(o.shape[0]) for y in tiny_llama.layers for o in y.operators}
    trial, written = Trials((pattern, step), 2), dict[tuple[Constraint, str], Tensor]()

    def visit(context: LayerContext, weights: Weights) -> None:
        for each, own in weights.items():
            written.update({(each, f"{context.layer.name}.{o.name}"): w for o, w in own.items()})
        Trials.visit(trial, context, weights)

    with patch.object(trial, "visit", visit):
        survey(tiny_llama, TOKENS.split(1), 1, [pattern, step], ones, Magnitude(), trials=[trial])
    assert all(torch.equal(p, before[name]) for name, p in tiny_llama.model.named_parameters())
    assert all(each.violation(weight) == 0 for (each, _), weight in written.items())
    added = added_divergences(tiny_llama, TOKENS[3:].split(1), trial)

    def divergence(group: str | None) -> float:
        model = deepcopy(tiny_llama.model)
        for name in names:
            own = step if group in trial.groups[name] and (step, name) in written else pattern
            model.get_parameter(f"{name}.weight").copy_(written[own, name])
        dense, pruned = (log_softmax(m(TOKENS[3:]).logits[:, :-1].double(), -1) for m in (tiny_llama.model, model))
        return float(kl_div(pruned, dense, log_target=True, reduction="none").sum(-1).mean())

    base = divergence(None)
    assert set(added) == {y.name for y in tiny_llama.layers} | {o.name for o in tiny_llama.layers[0].operators}
    assert added == {name: pytest.approx(divergence(name) - base, rel=1e-3, abs=1e-6) for name in added}
    unfit = {name for name in names if (step, name) not in written}  # keys and values have too few rows for 1.5 bits
    assert len(unfit) == (0 if pattern == TWO_OF_FOUR else 4) and len({*added.values()}) >= len(added) - 1
    assert PRUNED not in added


def test_a_trial_on_a_grid_is_a_sweep_without_a_beam(tiny_llama: HuggingFaceModel):
    ones = {f"{y.name}.{o.name}": torch.ones(o.shape[0]) for y in tiny_llama.layers for o in y.operators}
    grids = (on_grid("int8"), on_grid("int4"))
    with patch.object(Sweep, "beam", autospec=True, side_effect=Sweep.beam) as beam:
        survey(tiny_llama, TOKENS.split(1), 1, grids, ones, trials=[Trials(grids, 2)])
    assert {call.args[3] for call in beam.call_args_list} == {WIDE}  # which judges a few rows


def test_costs_go_half_of_the_way_to_what_is_measured_of_layers_and_of_kinds():
    costs: dict[Constraint, float] = {THREE_OF_FOUR: 1.0, TWO_OF_FOUR: 2.0, ONE_OF_FOUR: 4.0}
    units = [Unit(name, 64, costs, 0.0, 0.0) for name in ("0.a", "0.b", "1.a", "1.b")]
    groups = {unit.name: unit.name.split(".") for unit in units}
    added = {"0": 6.0, "1": 2.0, "a": 8.4, "b": -0.4}  # on average as predicted, and b far below
    found = measured(units, (TWO_OF_FOUR, ONE_OF_FOUR), added, groups)
    factors = [(1.5 * 2.1) ** 0.5, (1.5 * 0.1) ** 0.5, (0.5 * 2.1) ** 0.5, (0.5 * 0.1) ** 0.5]
    assert [unit.costs[TWO_OF_FOUR] for unit in found] == pytest.approx([2 * factor for factor in factors])
    assert further(ONE_OF_FOUR) == TWO_OF_FOUR and further(THREE_OF_FOUR) == TWO_OF_FOUR


@pytest.mark.parametrize("added", [-1.0, 0.0, float("nan")])
def test_measurements_that_say_nothing_are_refused(added: float):
    units = [Unit(name, 64, {TWO_OF_FOUR: 2.0, ONE_OF_FOUR: 4.0}, 0.0, 0.0) for name in "ab"]
    groups = {name: ("layer", name) for name in "ab"}
    with pytest.raises(CalibrationError, match="Calibrate on more, or take 'curve'"):
        measured(units, (TWO_OF_FOUR, ONE_OF_FOUR), {"a": 0.0, "b": 1.0, "layer": added}, groups)


@pytest.mark.long
@pytest.mark.parametrize(
    "asked", [{"method": "sparsegpt", "pattern": "4:8"}, {"sparsity": 0.0, "bits": 3.0}], ids=["4:8", "3 bits"]
)
def test_a_run_has_what_is_asked_for_and_computes_its_shares_once(
    tiny_llama: HuggingFaceModel, tmp_path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
):
    settings: dict[str, Any] = {
        "allocation": "measured", "dataset": TOKENS, "threads": 1, "num_calibration_samples": 4,
        "held_out_samples": 1, "bound_rows": 0, **asked,
    }  # fmt: skip
    dense = tmp_path / "dense"
    tiny_llama.model.save_pretrained(dense, max_shard_size="40KB")

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr("convexprune._api.pruning.Job", broken)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(dense, output_dir=tmp_path / "out", **settings)
    with monkeypatch.context() as resumed:
        resumed.setattr("convexprune.adapters._allocating.survey", broken)
        there = convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, **settings).report
    here = convexprune.prune(tiny_llama.model, **settings).report
    patterns = {operator.name: operator.pattern for operator in there.operators}
    shares = [parse_pattern(o.pattern).share * o.outputs * o.inputs for o in there.operators]
    whole = sum(o.outputs * o.inputs for o in there.operators)
    assert sum(shares) / whole == pytest.approx(1 - 3 / 16 if "bits" in asked else 0.5, abs=1e-5)
    assert "bits" in asked or here.sparsity == there.sparsity == 0.5
    assert len(set(patterns.values())) > 1 and patterns == {o.name: o.pattern for o in here.operators}
