"""Trials measure whole networks, and the allocation follows the measurement."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

import convexprune
from convexprune._layerwise.allocation import Unit, further, measured
from convexprune._layerwise.steps.survey import survey
from convexprune._layerwise.steps.trials import PRUNED, Trials
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._allocating import added_divergences
from convexprune.constraints import Constraint, SemiStructured
from convexprune.errors import CalibrationError
from convexprune.pruners import Magnitude

TOKENS = torch.randint(2, 4000, (5, 24), generator=torch.Generator().manual_seed(0))
TWO_OF_FOUR, THREE_OF_FOUR, ONE_OF_FOUR = (SemiStructured(kept, 4) for kept in (2, 3, 1))


@torch.no_grad()
def test_a_trial_is_the_divergence_of_a_whole_network(tiny_llama: HuggingFaceModel):
    """Slow twin: copies of the model whose operators are pruned by hand."""
    names = [f"{layer.name}.{operator.name}" for layer in tiny_llama.layers for operator in layer.operators]
    before = {name: p.clone() for name, p in tiny_llama.model.named_parameters()}
    ones = {f"{y.name}.{o.name}": torch.ones(o.shape[0]) for y in tiny_llama.layers for o in y.operators}
    trial = Trials(TWO_OF_FOUR, further(TWO_OF_FOUR), 2)
    survey(tiny_llama, TOKENS.split(1), 1, [TWO_OF_FOUR, ONE_OF_FOUR], ones, Magnitude(), trials=[trial])
    assert all(torch.equal(p, before[name]) for name, p in tiny_llama.model.named_parameters())
    added = added_divergences(tiny_llama, TOKENS[3:].split(1), trial)

    def divergence(step: str | None) -> float:
        model = deepcopy(tiny_llama.model)
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            weight *= (ONE_OF_FOUR if name == step else TWO_OF_FOUR).mask(weight.abs())
        dense, pruned = (log_softmax(m(TOKENS[3:]).logits[:, :-1].double(), -1) for m in (tiny_llama.model, model))
        return float(kl_div(pruned, dense, log_target=True, reduction="none").sum(-1).mean())

    base = divergence(None)
    assert added == {name: pytest.approx(divergence(name) - base, rel=1e-3, abs=1e-6) for name in names}
    assert PRUNED not in added and len(set(added.values())) == len(names)


def test_costs_go_half_of_the_way_to_what_is_measured():
    costs: dict[Constraint, float] = {THREE_OF_FOUR: 1.0, TWO_OF_FOUR: 2.0, ONE_OF_FOUR: 4.0}
    units = [Unit(name, 64, costs, 0.0, 0.0) for name in "abcd"]
    found = measured(units, TWO_OF_FOUR, {"a": 4.0, "b": 1.0, "c": -1.0, "d": 4.0})  # on average as predicted
    assert [unit.costs[TWO_OF_FOUR] for unit in found] == pytest.approx([2 * 2**0.5, 2**0.5, 2 * 0.1**0.5, 2 * 2**0.5])
    assert further(ONE_OF_FOUR) == TWO_OF_FOUR and further(THREE_OF_FOUR) == TWO_OF_FOUR


@pytest.mark.parametrize("added", [-1.0, 0.0, float("nan")])
def test_measurements_that_say_nothing_are_refused(added: float):
    units = [Unit(name, 64, {TWO_OF_FOUR: 2.0, ONE_OF_FOUR: 4.0}, 0.0, 0.0) for name in "ab"]
    with pytest.raises(CalibrationError, match="Calibrate on more, or take 'curve'"):
        measured(units, TWO_OF_FOUR, {"a": 0.0, "b": added})


def test_a_run_has_the_zeros_asked_for_and_computes_its_shares_once(
    tiny_llama: HuggingFaceModel, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    settings: dict[str, Any] = {
        "method": "sparsegpt", "pattern": "4:8", "allocation": "measured", "dataset": TOKENS, "threads": 1,
        "num_calibration_samples": 4, "held_out_samples": 1, "bound_rows": 0,
    }  # fmt: skip
    dense = tmp_path / "dense"
    tiny_llama.model.save_pretrained(dense, max_shard_size="40KB")

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr("convexprune._api.pruning.prune_in_folder", broken)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(dense, output_dir=tmp_path / "out", **settings)
    with monkeypatch.context() as resumed:
        resumed.setattr("convexprune.adapters._allocating.survey", broken)
        there = convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, **settings).report
    here = convexprune.prune(tiny_llama.model, **settings).report
    assert here.sparsity == there.sparsity == 0.5
    patterns = {operator.name: operator.pattern for operator in there.operators}
    assert len(set(patterns.values())) > 1 and patterns == {o.name: o.pattern for o in here.operators}
