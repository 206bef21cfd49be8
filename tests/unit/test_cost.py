"""The formulas of memory against torch's own count of what it allocates, and their arithmetic by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from convexprune._layerwise import pipeline
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractOperator, DecoderLayer, Group, ModuleInput
from convexprune._layerwise.pipeline import Pipeline
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.statistics import ROOM, CalibrationStatistics, in_parts
from convexprune._layerwise.steps import measure as bounding
from convexprune._layerwise.steps.measure import WIDE
from convexprune._layerwise.work import stack_steps
from convexprune._runs import cost, sizes
from convexprune._runs.cost import Speed, seconds
from convexprune._schema.functions import ADVISE, INSPECT
from convexprune.adapters._inspection import inspection
from convexprune.adapters._inspection.outline import method_of
from convexprune.constraints import Columns, Unstructured
from convexprune.core._moments import ErrorMoments
from convexprune.errors import RecipeError
from convexprune.pruners import (
    ADMM,
    ALPS,
    OSSCAR,
    AbstractPruner,
    Convex,
    FISTAPruner,
    Refitted,
    SparseGPT,
    Wanda,
)
from convexprune.quantizers import Descent
from convexprune.recipe import make_recipe


class Matrix(AbstractOperator):
    """A weight on its own."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight = name, weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def read(self) -> Tensor:
        return self.weight

    def write(self, weight: Tensor) -> None:
        self.weight.copy_(weight)


def allocated(work: Callable[[], Any]) -> int:
    """The most bytes that were alive at once, beside those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    now = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


SHAPES = [((384,), 384), ((512, 512), 256), ((192,), 512)]  # the heights of a stack, and its width
METHODS: dict[str, AbstractPruner] = {
    "convex": Convex(rounds=5),
    "admm": ADMM(iterations=8),
    "alps": ALPS(),
    "fistapruner": FISTAPruner(),
    "sparsegpt": SparseGPT(),
    "osscar": OSSCAR(),
    "wanda": Wanda(),
    "wanda, refit": Refitted(Wanda()),
    "convex, weighed": Convex(rounds=5),
    "sparsegpt, weighed": SparseGPT(),
}


@pytest.mark.parametrize(("heights", "n"), SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_memory_of_a_problem_is_what_torch_allocates(name: str, heights: tuple[int, ...], n: int):
    measured, predicted = memory(name, heights, n, bound=False)
    assert predicted == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("wide", [512, 100])  # the inputs beyond which a split is not fitted
@pytest.mark.parametrize("name", ["convex", "wanda"])
def test_memory_of_a_bound_is_what_torch_allocates(name: str, wide: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounding, "WIDE", wide)
    monkeypatch.setattr(cost, "BOUND", {wide: cost.BOUND[WIDE], 4096: cost.BOUND[bounding.WIDEST]})
    measured, predicted = memory(name, (64, 64), 512, bound=True)
    assert predicted == pytest.approx(measured, rel=0.2)


def memory(name: str, heights: tuple[int, ...], n: int, bound: bool) -> tuple[int, int]:
    """Bytes that are allocated to prune a stack, and those that the formula says."""
    method, *more = name.split(", ")
    corrected, weighed = method in ("convex", "wanda"), "weighed" in more
    random = torch.Generator().manual_seed(0)
    operators = tuple(Matrix(f"w{i}", torch.randn(m, n, generator=random)) for i, m in enumerate(heights))
    own = Group(operators, ModuleInput(nn.Identity()))
    layer = DecoderLayer("layer", nn.Identity(), ((own,),))
    folds = CalibrationStatistics(
        n, torch.device("cpu"), sum(heights) if ErrorMoments.cheaper_in_output_space(sum(heights), n) else None
    )

    def fill() -> None:
        for i in range(3):
            x = torch.randn(1, 2 * n, n, generator=random)
            lacking = torch.randn(1, 2 * n, folds.held_out.outputs or n, generator=random) / 10
            folds.add(x, lacking if corrected else None, i == 2)

    fill()
    pattern = Columns(0.5) if method == "osscar" else Unstructured(0.5)
    weights = {f"layer.{o.name}": torch.linspace(0.5, 2, o.shape[0]) for o in operators} if weighed else {}
    settings = LayerSettings(METHODS[name], pattern, bound_rows=2 if bound else 0, row_weights=weights)
    prune = pruning(layer, settings, {own: folds})

    measured = allocated(prune)
    stack = sizes.Stack(tuple(o.name for o in operators), heights, n)
    own = METHODS[name].cost
    return measured, cost.problem_bytes(stack, own._replace(rectangles=own.rectangles + cost.SCALED * weighed), bound)


@pytest.mark.parametrize(("heights", "n"), [((192,), 128), ((64, 64), 192)])
@pytest.mark.parametrize("name", ["rtn", "gptq", "descent", "descent, bits", "descent, beam 1"])
def test_memory_of_a_quantizer_is_what_torch_allocates(name: str, heights: tuple[int, ...], n: int):
    quantizer, _, more = name.partition(", ")
    kind: dict[str, Any] = {"bits": 3.3} if more == "bits" else {"quantize": "int4"}
    settings = make_recipe(sparsity=0, quantizer=quantizer, **kind).layer_settings()
    if more == "beam 1":
        settings = replace(settings, quantizer=Descent(beam=1))
    random = torch.Generator().manual_seed(0)
    operators = tuple(Matrix(f"w{i}", torch.randn(m, n, generator=random)) for i, m in enumerate(heights))
    own = Group(operators, ModuleInput(nn.Identity()))
    folds = CalibrationStatistics(n, torch.device("cpu"))
    for i in range(3):
        folds.add(torch.randn(1, 2 * n, n, generator=random), None, i == 2)
    assert settings.pattern.grid is not None
    needs = settings.quantizer.cost(settings.pattern.grid, dense=True)
    measured = allocated(pruning(DecoderLayer("layer", nn.Identity(), ((own,),)), settings, {own: folds}))
    predicted = cost.problem_bytes(sizes.Stack(tuple(o.name for o in operators), heights, n), needs)
    assert predicted == pytest.approx(measured, rel=0.25)


Folds = dict[Group, CalibrationStatistics]


def pruning(layer: DecoderLayer, settings: LayerSettings, folds: Folds) -> Callable[[], None]:
    """Prune a layer of one stage, whose statistics are known, so that nothing is run."""
    nowhere: dict[str, Any] = {"model": None, "number": 0, "calls": None, "states": None}
    context = LayerContext(layer=layer, inputs={"dense": ()}, first=folds, **nowhere)
    return lambda: Pipeline(settings, stack_steps(settings, lambda _: None))(context)


@pytest.mark.parametrize("bound", [False, True])
def test_memory_of_problems_side_by_side_is_what_torch_allocates(bound: bool, monkeypatch: pytest.MonkeyPatch):
    heights, n, random = (48, 48) if bound else (256, 256), 384, torch.Generator().manual_seed(0)
    folds = dict[Group, CalibrationStatistics]()
    for _ in range(4):
        operators = tuple(Matrix(f"w{i}", torch.randn(m, n, generator=random)) for i, m in enumerate(heights))
        filled = CalibrationStatistics(n, torch.device("cpu"))
        for i in range(3):
            filled.add(torch.randn(1, 2 * n, n, generator=random), None, i == 2)
        folds[Group(operators, ModuleInput(nn.Identity()), False)] = filled
    monkeypatch.setattr(pipeline, "at_once", lambda *_: 4)
    settings = LayerSettings(METHODS["convex"], Unstructured(0.5), correction=0, bound_rows=2 if bound else 0)
    measured = allocated(pruning(DecoderLayer("layer", nn.Identity(), (tuple(folds),)), settings, folds))
    stack = sizes.Stack(("a", "b"), heights, n, token_aligned=False)
    layers = sizes.LayerSize(((stack,) * 4,), 0, 0, 1), sizes.LayerSize(((stack,),), 0, 0, 1)
    alone = replace(SETTING, correction=False, bound=bound)
    model = replace(PLAIN, layers=layers)
    assert cost.memory(model, alone).beside == 0
    needed = cost.memory(model, replace(alone, side_by_side=True))
    assert needed.method + needed.beside == pytest.approx(measured, rel=0.2)
    assert (
        needed.device - needed.beside == cost.memory(model, alone).device
        and needed.all == cost.memory(model, alone).all
    )


@pytest.mark.parametrize("m", [64, 512])
@pytest.mark.parametrize("corrected", [False, True])
def test_memory_of_moments_is_what_torch_allocates(corrected: bool, m: int):
    n, kept = 256, []
    outputs = m if ErrorMoments.cheaper_in_output_space(m, n) else None

    def fill() -> None:
        folds = CalibrationStatistics(n, torch.device("cpu"), outputs)
        for i in range(3):
            folds.add(torch.ones(1, 2, n), torch.zeros(1, 2, outputs or n) if corrected else None, i == 2)
        kept.append((folds, folds.held_out))  # asked for it, what waits is counted

    assert cost.moments_bytes(sizes.Stack(("w",), (m,), n), corrected) == pytest.approx(allocated(fill), rel=0.05)


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
