"""Kept values that move after pruning: masks, codes and counts stay, and held-out outputs are never further away."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_contexts import context_of, pruned
from runs import SETTINGS, require_resumed
from test_team import in_a_group
from tiny_families import VOCABULARY, build_family
from torch import Tensor, nn

import convexprune
from convexprune._layerwise.layer_error import Kept, LayerError
from convexprune._layerwise.model import Call
from convexprune._layerwise.processes import ProcessGroup
from convexprune._layerwise.settings import LayerSettings, Refinement
from convexprune._layerwise.steps import refine as refining
from convexprune._layerwise.steps.refine import GaussNewton
from convexprune._rendering.facts import facts
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._discovery.operators import ParameterOperator, Place
from convexprune.constraints import Constraint, Grid, Quantized, SemiStructured, Unstructured
from convexprune.errors import ModelError, RecipeError
from convexprune.pruners import SparseGPT
from convexprune.recipe import make_recipe
from convexprune.report import OperatorReport
from convexprune.validation._variants import make_variants

TOKENS = torch.randint(2, VOCABULARY - 2, (12, 24), generator=torch.Generator().manual_seed(0))
HALF = Unstructured(0.5)


def refined(
    family: str, pattern: Constraint, refine: str, dtype: torch.dtype = torch.float32, held_out: int = 0
) -> tuple[dict[str, Tensor], list[OperatorReport]]:
    """The weights of a first layer after pruning and refinement, and the reports."""
    torch.manual_seed(0)
    context = context_of(HuggingFaceModel(build_family(family).to(dtype)), TOKENS, batch=2, held_out=held_out)
    reports = pruned(context, LayerSettings(SparseGPT(), pattern, refinement=Refinement.parse(refine)))
    return {o.name: o.read().clone() for o in context.layer.operators}, reports


@pytest.mark.parametrize(
    ("family", "pattern", "refine", "dtype"),
    [
        ("llama", SemiStructured(2, 4), "layer", torch.float16),
        ("llama", HALF, "half-layer:gauss-newton", torch.float32),
        ("gpt2", HALF, "layer:gauss-newton", torch.float16),
        ("gpt2", SemiStructured(2, 4), "half-layer", torch.float32),
        ("mixtral", HALF, "half-layer", torch.float16),
    ],
)
def test_values_move_and_masks_stay(family: str, pattern: Constraint, refine: str, dtype: torch.dtype):
    before, plain = refined(family, pattern, "none", dtype)
    after, reports = refined(family, pattern, refine, dtype)
    first = next(iter(before))
    assert torch.equal(before[first] != 0, after[first] != 0)  # later ones may see other inputs, and choose others
    assert [r.zeros for r in reports] == [r.zeros for r in plain] == [r.expected_zeros for r in reports]
    assert all(r.facts["refine_held_out"] < r.facts["refine_held_out_before"] for r in reports)
    assert not torch.equal(before[first], after[first])


def test_codes_stay_and_scales_move():
    grid = Grid(4, -1)
    before, _ = refined("llama", Quantized(HALF, grid), "none")
    after, reports = refined("llama", Quantized(HALF, grid), "layer")
    moved = 0
    for name, weight in before.items():
        (scales, codes, _), (others, same, on) = grid.find(weight), grid.find(after[name])
        signs = scales.sign() * others.sign()
        assert bool(on.all()) and torch.equal(
            codes, same * signs.repeat_interleave(weight.shape[1] // signs.shape[1], 1)
        )
        moved += int((scales.abs() != others.abs()).sum())
    assert moved and all(r.facts["refine_held_out"] < r.facts["refine_held_out_before"] for r in reports)


def test_the_reported_errors_are_those_of_the_layer_as_it_is():
    context = context_of(HuggingFaceModel(build_family("llama")), TOKENS, batch=2, held_out=2)
    reports = pruned(context, LayerSettings(SparseGPT(), HALF, refinement=Refinement.parse("layer")))
    for name, part in (("refine_error", slice(-2)), ("refine_held_out", slice(-2, None))):
        now, dense = torch.cat(list(context.outputs())[part]), torch.cat(list(context.observed.outputs)[part])
        added = dense - torch.cat(list(context.inputs["dense"])[part])
        error = float((now - dense).square().sum() / added.square().sum())
        assert reports[0].facts[name] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("held_out", [0, 2])
def test_a_way_that_makes_it_worse_changes_nothing(held_out: int, monkeypatch: pytest.MonkeyPatch):
    class Worse(refining.AbstractWay):
        def candidates(self, error: LayerError, numbers: Sequence[int]) -> refining.Candidates:
            yield {name: each + 1 for name, each in error.zero().items()}, {"refine_steps": 1.0}

    monkeypatch.setitem(refining.WAYS, "adam", Worse)
    before, _ = refined("llama", HALF, "none", held_out=held_out)
    after, reports = refined("llama", HALF, "layer", held_out=held_out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(r.facts["refine_held_out"] == r.facts["refine_held_out_before"] for r in reports)
    assert all("refine_steps" not in r.facts for r in reports)


class Toy(nn.Module):
    """Two linear maps with a curve between, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.tanh(self.first(x)))


def toy_error() -> LayerError:
    """The error of a toy layer with half of its weights zero, whose targets are not reached."""
    generator = torch.Generator().manual_seed(0)
    module = Toy().double().requires_grad_(False).float()
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    inputs = [torch.randn(2, 5, 6, generator=generator) for _ in range(3)]
    targets = [module(x) for x in inputs]
    operators = {n: ParameterOperator(module.get_submodule(n), Place(n)) for n in ("first", "last")}
    for operator in operators.values():
        operator.write(operator.read() * (torch.rand(operator.shape, generator=generator) < 0.5))
    movable = {name: Kept(operator.read().clone()) for name, operator in operators.items()}
    return LayerError(
        module, lambda _: Call(), operators, movable, inputs, lambda i: targets[i], lambda i: targets[i] - inputs[i]
    )


def test_sums_over_ranks_are_those_of_one():
    generator = torch.Generator().manual_seed(1)
    x = {name: torch.randn(each.shape, generator=generator) / 9 for name, each in toy_error().zero().items()}

    def sums(ranks: ProcessGroup) -> tuple[Any, ...]:
        error, numbers = replace(toy_error(), ranks=ranks), range(3)[ranks.local_slice(3)]
        return (
            error.relative(x, numbers), error.tokens(numbers), error.gradient(x, numbers), error.product(x, x, numbers),
        )  # fmt: skip

    (one,), several = in_a_group(1, sums), in_a_group(2, sums)
    for each in several:
        torch.testing.assert_close(each, one)
    assert torch.backends.cuda.flash_sdp_enabled()  # no thread has left a switch of the process behind


@pytest.mark.parametrize("iterations", [3, 100])
def test_a_convex_step_is_least_squares_on_the_support(iterations: int):
    error, numbers = toy_error(), range(3)
    way = GaussNewton(steps=1, iterations=iterations, tolerance=0)
    ((found, facts),) = way.candidates(error, numbers)
    start = error.zero()
    metric = {n: way.proximal * refining._smoothed(each) for n, each in error.squared_slopes(start, numbers).items()}

    def residual(flat: Tensor) -> Tensor:
        parts = flat.split([each.numel() for each in start.values()])
        x = {name: part.view_as(start[name]) for name, part in zip(start, parts, strict=True)}
        return torch.cat([error._residual(x, i).flatten() for i in numbers])

    zero = torch.cat([each.flatten() for each in start.values()])
    slopes, left = torch.func.jacrev(residual)(zero).double(), residual(zero).double()
    weights = torch.cat([metric[name].flatten() for name in start]).double()
    exact = -torch.linalg.solve(slopes.T @ slopes + weights.diag(), slopes.T @ left)

    def objective(x: Tensor) -> float:
        return float((left + slopes @ x).square().sum() + (weights * x.square()).sum()) / 2

    x = torch.cat([found[name].flatten() for name in start]).double()
    gap = objective(x) - objective(exact)
    assert gap <= facts["refine_gap"] * objective(x) * (1 + 1e-4) + 1e-6
    if iterations == 100:
        torch.testing.assert_close(x, exact, rtol=1e-3, atol=1e-4)
    else:
        assert gap > 1e-4 * objective(exact)


def test_a_variant_of_a_comparison_may_be_refined():
    (variant,) = make_variants(["sparsegpt:refine=half-layer"], [0.5], ["unstructured"], ["own"])
    assert variant.layer_settings().refinement == Refinement(True, "adam")


def test_a_layer_without_derivatives_is_refused():
    with pytest.raises(ModelError, match=r"BloomBlock has an autograd.Function.*Leave refine out"):
        refined("bloom", HALF, "layer")


def test_the_summary_says_what_it_brought(dense: Path):
    report = convexprune.prune(dense, **SETTINGS, refine="layer").report
    (fact,) = [fact for fact in facts(report) if fact.name == "refined"]
    assert "held-out tokens is" in fact.text and "operators kept their values" in fact.text
    settings: dict[str, Any] = SETTINGS | {"held_out_samples": 0}
    report = convexprune.prune(dense, **settings, refine="layer").report
    (fact,) = [fact for fact in facts(report) if fact.name == "refined"]
    assert "calibration tokens is" in fact.text  # no others are there


def test_a_resumed_run_has_the_same_bits(dense: Path, tmp_path: Path):
    require_resumed(dense, tmp_path, **SETTINGS, refine="half-layer")


@pytest.mark.parametrize(
    "given",
    [
        {"refine": "model"},
        {"refine": "none:adam"},
        {"refine": "layer:sgd"},
        {"refine": "layer", "quantize": "nf4"},
        {"refine": "layer", "sparsity": 0.0},
    ],
)
def test_other_requests_are_refused(given: dict[str, Any]):
    with pytest.raises(RecipeError, match="refine"):
        make_recipe(**given)
    make_recipe(refine="layer", sparsity=0.0, rules=[{"targets": ["q_proj"], "sparsity": 0.5}])
    assert make_recipe(refine="layer", quantize="int4").layer_settings().refinement == Refinement(False, "adam")
