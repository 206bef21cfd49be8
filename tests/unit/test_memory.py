"""The formulas of memory against torch's own count of what it allocates."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_cost import PLAIN, SETTING
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from convexprune._layerwise import pipeline
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractOperator, DecoderLayer, Group, ModuleInput
from convexprune._layerwise.pipeline import Pipeline
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune._layerwise.steps import measure as bounding
from convexprune._layerwise.steps.measure import WIDE
from convexprune._layerwise.work import stack_steps
from convexprune._runs import cost, sizes
from convexprune.constraints import Columns, Unstructured
from convexprune.core._moments import ErrorMoments
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
    gc.collect()  # what earlier tests left would be freed in the middle, and counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    raw: Any = seen.profiler  # its raw records: a trace, or `seen.events()`, takes seconds to build
    records = [each for each in raw.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for record in sorted(records, key=lambda each: each.start_ns()):
        now += record.nbytes()
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


QUANTIZERS = ("rtn", "gptq", "descent", "descent, bits", "descent, beam 1")
QUANTIZED = [(name, *shape) for name in QUANTIZERS for shape in (((192,), 128), ((64, 64), 192))]


WIDE_ONES = [("gptq", (64,), 768), pytest.param("descent, beam 1", (256,), 1024, marks=pytest.mark.long)]


@pytest.mark.parametrize(("name", "heights", "n"), [*QUANTIZED, *WIDE_ONES])  # of the wide matrices [n n] decide
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
