"""Forecasts of memory, disk, work and time: their arithmetic by hand, and the method that they are of."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convexprune._layerwise.statistics import ROOM, CalibrationStatistics, in_parts
from convexprune._runs import cost, sizes
from convexprune._runs.cost import Speed, seconds
from convexprune._schema.functions import ADVISE, INSPECT
from convexprune.adapters._inspection import inspection
from convexprune.adapters._inspection.outline import method_of
from convexprune.errors import RecipeError
from convexprune.pruners import (
    Convex,
    Cost,
    Refitted,
    SparseGPT,
)
from convexprune.recipe import make_recipe


def forecast(**settings: Any) -> cost.Operations:
    recipe = make_recipe(**settings)
    return cost.work(PLAIN, replace(SETTING, method=method_of(recipe, recipe.build_pruner())))


def test_a_forecast_is_that_of_what_runs():
    nothing, pruned = forecast(method="magnitude"), forecast()
    assert forecast(sparsity=0, quantize="int4", quantizer="rtn") == nothing != pruned
    swept = forecast(sparsity=0, quantize="int4", quantizer="gptq")
    by_beam, coded = forecast(sparsity=0, quantize="int4"), forecast(sparsity=0, bits=3.3)
    assert nothing.products < swept.products < coded.products < by_beam.products < pruned.products
    both = forecast(quantize="int4")  # codes of a weight with zeros have no beam
    assert pruned.products < both.products < pruned.products + by_beam.products - nothing.products


PLAIN = sizes.ModelSize(
    layers=(
        sizes.LayerSize(
            stages=((sizes.Stack(("q", "k"), (8, 4), 8),), (sizes.Stack(("o",), (8,), 6),)),
            parameters=150,
            largest=96,
            count=3,
        ),
    ),
    fixed=100,
    largest_fixed=80,
    hidden=8,
    itemsize=2,
)
SETTING = sizes.Setting(samples=4, held_out=1, length=10, batch=1, method=Convex.cost)


def test_work_is_counted_by_hand():
    found = cost.work(PLAIN, SETTING)
    attention = 4 * 10 * 8
    once, until_o = 2 * (96 + 48) + attention, 2 * 96 + attention
    assert found.forward == 3 * 50 * (once + until_o)
    assert found.gram == 3 * 50 * (64 + 4 * 36)  # what comes second makes up for what comes first
    assert found.problems == 6 and found.products == 3 * (98 + 106)
    assert found.solve == 3 * (2 * 94 * (12 * 64 + 8 * 36) + 8 * (8**3 + 6**3))
    assert found.judge == 3 * 2 * (4 * 12 * 64 + 12 * 8 * 36)
    differentiated = cost.work(PLAIN, replace(SETTING, gradients=2))  # twice through 3 layers and back; head, and back
    assert differentiated.forward == found.forward + 20 * (3 * 3 * once + 2 * 2 * 80)
    assert differentiated == replace(found, forward=differentiated.forward)
    seen = replace(SETTING, surveyed=2, survey=Cost(products=3, factorisations=5, overhead=2.0))
    solving = 2 * 3 * (12 * 64 + 8 * 36) + 5 * (8**3 + 6**3)
    assert cost.work(PLAIN, seen) == replace(
        found,
        forward=found.forward + 3 * 20 * once,
        gram=found.gram + 3 * 20 * (64 + 36),
        judge=found.judge + 3 * 2 * solving,
    )
    assert cost.work(PLAIN, replace(SETTING, survey=seen.survey)) == found


def test_an_overhead_is_that_of_the_methods_own_products():
    found = cost.work(PLAIN, SETTING)
    lap = seconds(found, Speed(single=10.0, forward=5.0), Convex.cost)
    assert lap == {
        "forward": found.forward / 5,
        "gram": found.gram / 10,
        "solve": pytest.approx((1.8 * found.solve + found.judge) / 10),
    }
    refitted = Refitted(SparseGPT()).cost  # one product of its own, sixty of the refit
    assert refitted.products == 61 and refitted.overhead == pytest.approx((8 + 60 * 3) / 61)


def test_what_comes_after_attention_does_not_run_it_again():
    (layer,) = PLAIN.layers
    after = (sizes.Stack(("fc1",), (20,), 8),), (sizes.Stack(("fc2",), (8,), 20),)
    model = replace(PLAIN, layers=(replace(layer, stages=layer.stages + after),))
    attention = 4 * 10 * 8
    once, until_o, until_fc1, until_fc2 = 2 * (144 + 320) + attention, 2 * 96 + attention, 2 * 48, 2 * (48 + 160)
    assert cost.work(model, SETTING).forward == 3 * 50 * (once + until_o + until_fc1 + until_fc2)
    kept = 2 * 50 * (6 + 8)  # what o and fc1 see in the pruned layer
    assert cost.memory(model, SETTING).disk == cost.memory(PLAIN, SETTING).disk + 2 * 50 * 28 + kept
    fed = replace(SETTING, dense_prefix=False)
    to_the_end = 2 * (48 + 320)
    assert cost.work(model, fed).forward == 3 * 50 * (once + until_o + until_fc1 + until_fc2 + to_the_end)


def test_disk_is_counted_by_hand():
    found = cost.memory(PLAIN, SETTING)
    layers, hidden, seen = 2 * 3 * 150, 2 * 50 * 8, 2 * 50 * (8 + 6)
    assert found.disk == layers + PLAIN.bytes + 2 * hidden + seen
    assert PLAIN.bytes == 2 * (100 + 450)
    assert found.fixed == 200 and found.layer == 300


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 4))
def test_experts_come_in_parts_that_fit(widths: int, experts: int, seed: int):
    stage = [sizes.Stack((str(i),), (8,), 2048 * widths, token_aligned=False) for i in range(experts)]
    parts = in_parts([sizes.Stack(("q",), (8,), 8), *stage], lambda s: s.inputs)
    assert [s for part in parts for s in part][1:] == stage and all(parts)
    assert all(
        sum(CalibrationStatistics.bytes(s.inputs) for s in p if not s.token_aligned) <= ROOM or len(p) == 1
        for p in parts[1:]
    )


def test_what_needs_less_is_offered():
    found = {way: cost.memory(PLAIN, s).device for way, s in cost.cheaper(SETTING, SparseGPT.cost, refit=False).items()}
    assert list(found) == ["--error-correction 0", "--method sparsegpt", "--method sparsegpt --error-correction 0"]


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 << 30), ("80 GB", 80 * 10**9), ("512mib", 512 << 20), ("1.5kB", 1500), ("7", 7)]
)
def test_amounts_of_memory(text: str, size: int):
    assert INSPECT.read({"device_memory": text})[0].device_memory == size


@pytest.mark.parametrize("text", ["", "many", "-1GiB", "3 XB"])
def test_what_is_no_amount_of_memory_is_refused(text: str):
    for door, name in ((INSPECT, "device_memory"), (ADVISE, "target")):
        with pytest.raises(RecipeError, match=rf"{name}='.*' is no amount of bytes\. Write it as 24GiB"):
            door.read({name: text})


def test_the_time_on_a_gpu_is_said_to_be_unchecked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspection, "default_device", lambda _: "cuda")
    monkeypatch.setattr(inspection, "measured_speed", lambda *_: Speed(1e12, 1e13))
    found = inspection.inspect(device_memory="80GB", num_calibration_samples=2)
    assert list(found.seconds) == ["forward", "gram", "solve"]
    assert found.notes[-1] == inspection.NO_GPU
