"""Steps of a layer in a row: what a step does after pruning is what the report says, and later passes see it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_contexts import context_of
from test_memory import allocated
from tiny_families import VOCABULARY, build_family
from torch import Tensor

from convexprune._layerwise.capture import stage_inputs, through
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.pipeline import AbstractLayerStep, AbstractStackStep, Pipeline, Stack
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune._layerwise.steps.measure import Measure
from convexprune._layerwise.steps.observe import Observe
from convexprune._layerwise.steps.prune import Prune, Quantize, Repair
from convexprune.adapters import HuggingFaceModel
from convexprune.constraints import Grid, Quantized, Unstructured
from convexprune.errors import PruningError
from convexprune.pruners import Convex, Damping, LayerProblem, SparseGPT, _search
from convexprune.report import OperatorReport

TOKENS = torch.randint(2, VOCABULARY - 2, (6, 24), generator=torch.Generator().manual_seed(0))
HALF = LayerSettings(SparseGPT(), Unstructured(0.5), bound_rows=2)
ON_GRID = replace(HALF, pattern=Quantized(Unstructured(0.5), Grid(4, -1)))


class Refine(AbstractLayerStep):
    """A toy: shrinks what is left of every operator, without telling anyone which."""

    def __call__(self, context: LayerContext) -> None:
        for operator in context.layer.operators:
            operator.write(operator.read() * 0.8)


class Shrink(AbstractStackStep):
    """The same, stack by stack, within the pass that prunes."""

    def __call__(self, stacks: Sequence[Stack]) -> None:
        for stack in stacks:
            stack.put(replace(stack.edit, weight=stack.edit.weight * 0.8))


class Revive(AbstractLayerStep):
    """A toy that breaks the pattern."""

    def __call__(self, context: LayerContext) -> None:
        context.layer.operators[0].write(torch.ones(context.layer.operators[0].shape))


def layer_of(family: str, prefix: str = "dense") -> LayerContext:
    context = context_of(HuggingFaceModel(build_family(family)), TOKENS, held_out=2)
    if prefix == "pruned":
        noise = torch.Generator().manual_seed(1)
        fed = [x + 0.1 * torch.randn(x.shape, generator=noise) for x in context.inputs["dense"]]
        context = replace(context, inputs={**context.inputs, "pruned": fed})
    return context


def run(context: LayerContext, settings: LayerSettings, *steps: Any) -> dict[str, OperatorReport]:
    """Observe, take the steps, and measure."""
    reports = list[OperatorReport]()
    Pipeline(settings, [Observe((settings.error_target,)), *steps, Measure(reports.append)])(context)
    return {report.name.removeprefix(f"{context.layer.name}."): report for report in reports}


@torch.no_grad()
def errors(context: LayerContext, dense: LayerContext, settings: LayerSettings, part: slice) -> dict[str, float]:
    """The relative errors of a layer as it is now, from its tokens in float64: targets are the dense outputs."""
    found = dict[str, float]()
    for group, whole in zip(context.layer.groups, dense.layer.groups, strict=True):
        given = [context.inputs[settings.prefix][part], dense.inputs["dense"][part]]
        places = (context, group), (dense, whole)
        x, y = (
            torch.cat([stage_inputs(c.layer, [g], c.calls(h), h)[g].flatten(0, 1) for h in batches]).double()
            for (c, g), batches in zip(places, given, strict=True)
        )
        for operator, before in zip(group.operators, whole.operators, strict=True):
            v, w = operator.read().double(), before.read().double()
            found[operator.name] = float((x @ v.T - y @ w.T).square().sum() / (y @ w.T).square().sum())
    return found


@pytest.mark.parametrize("prefix", ["dense", "pruned"])
@pytest.mark.parametrize(
    "steps", [(Prune(), Refine()), (Prune(), Refine(), Refine()), (Prune(), Shrink()), (Refine(),)]
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_step_after_pruning_is_reported_as_it_is(family: str, steps: Any, prefix: Any):
    settings, dense = replace(HALF, prefix=prefix), layer_of(family, prefix)
    context = layer_of(family, prefix)
    if not any(isinstance(step, Prune) for step in steps):
        settings = replace(settings, pattern=Unstructured(0.0))
    reports = run(context, settings, *steps)
    fitted, judged = (errors(context, dense, settings, part) for part in (slice(-2), slice(-2, None)))
    assert reports.keys() == fitted.keys()
    for name, report in reports.items():
        assert report.relative_error == pytest.approx(fitted[name], rel=1e-4)
        assert report.held_out_error == pytest.approx(judged[name], rel=1e-4)
        assert report.bound is None or report.bound["lower"] <= report.bound["error"]
    stale = run(layer_of(family, prefix), settings, *steps[:1])
    if len(steps) > 1:
        assert all(report.relative_error > stale[name].relative_error for name, report in reports.items())


def test_the_error_of_the_residual_stream_is_that_of_the_refined_layer():
    settings, dense = replace(HALF, error_target="residual_stream"), layer_of("llama")
    context = layer_of("llama")
    report = run(context, settings, Prune(), Refine())["mlp.down_proj"]
    batches = context.inputs["dense"][:-2]
    wanted, achieved = (torch.cat(list(through(c.layer, c.calls, batches))).double() for c in (dense, context))
    last = context.layer.operators[-1]
    refined = last.read().clone()
    last.write(torch.zeros_like(refined))
    rest = torch.cat(list(through(context.layer, context.calls, batches))).double()
    last.write(refined)
    energy = (wanted - rest).square().sum()
    assert report.relative_error == pytest.approx(float((achieved - wanted).square().sum() / energy), rel=1e-4)
    assert report.facts["corrects_layer"] == 1 and report.zeros == int((last.read() == 0).sum())


def test_solves_are_certified_until_a_step_moves_the_weights():
    settings = replace(HALF, pruner=Convex())
    plain, refined = (run(layer_of("llama"), settings, Prune(), *more) for more in ((), (Refine(),)))
    assert all(report.gap is not None and report.status == "SOLVED" for report in plain.values())
    assert all((r.gap, r.status, r.largest_gap, r.solves) == (None, None, None, 0) for r in refined.values())
    assert all(refined[name].products == report.products for name, report in plain.items())
    assert all(refined[name].damping == report.damping for name, report in plain.items())


@pytest.mark.parametrize("steps", [(Prune(), Refine()), (Prune(), Refine(), Quantize())])
def test_replayed_inputs_are_never_stale(steps: Any):
    context = layer_of("llama")
    run(context, ON_GRID if len(steps) > 2 else HALF, *steps)
    assert context.replayed
    found = list(context.outputs(replayed=context.replayed))
    assert all(map(torch.equal, found, through(context.layer, context.calls, context.inputs["dense"])))


def test_what_is_refined_before_it_is_quantized_is_on_the_grid_and_keeps_its_zeros():
    context, dense, masks = layer_of("llama"), layer_of("llama"), list[Tensor]()

    class Look(AbstractLayerStep):
        def __call__(self, context: LayerContext) -> None:
            masks.extend(operator.read() != 0 for operator in context.layer.operators)

    reports = run(context, ON_GRID, Prune(), Refine(), Look(), Quantize())
    found = errors(context, dense, ON_GRID, slice(-2))
    for operator, mask in zip(context.layer.operators, masks, strict=True):
        weight = operator.read()
        assert not weight[~mask].any() and ON_GRID.pattern.violation(weight) == 0
        assert reports[operator.name].relative_error == pytest.approx(found[operator.name], rel=1e-4)


def test_a_refined_layer_takes_no_more_memory_than_its_statistics():
    def used(*more: Any) -> int:
        context = layer_of("llama")
        return allocated(lambda: run(context, HALF, Prune(), *more))

    layer = layer_of("llama").layer
    statistics = sum(CalibrationStatistics.bytes(group.operators[0].shape[1]) for group in layer.groups)
    assert used(Refine()) - used() <= statistics


def test_the_step_that_reports_is_the_last():
    with pytest.raises(ValueError, match="has to be the last"):
        Pipeline(HALF, [Observe(), Prune(), Measure(lambda _: None), Refine()])


def test_a_step_that_breaks_the_pattern_is_refused():
    with pytest.raises(PruningError, match=r"q_proj: .* entries break the pattern"):
        run(layer_of("llama"), HALF, Prune(), Revive())


def loosely(problem: LayerProblem, damping: float | None) -> Damping:
    """A damping that leaves all noise in: next to nothing pulls."""
    return Damping(1e-5, 0.0, 1e-3)


def few_tokens() -> LayerContext:
    return context_of(HuggingFaceModel(build_family("llama")), TOKENS[:, :6], held_out=2)


def test_weights_that_fitted_noise_are_refitted_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_search, "choose_damping", loosely)
    settings = replace(HALF, pruner=Convex())
    loose, repaired = run(few_tokens(), settings, Prune()), run(few_tokens(), settings, Prune(), Repair())
    worse = {name for name, report in loose.items() if (report.held_out_error or 0) > 1}
    assert worse and worse <= {name for name, report in repaired.items() if "repairs" in report.facts}
    for name in worse:
        before, after = loose[name], repaired[name]
        assert after.held_out_error is not None and before.held_out_error is not None
        assert after.held_out_error < before.held_out_error and after.zeros == before.zeros
        assert after.damping is not None and after.damping.prior > 1e-3 and after.gap is not None
    assert "repairs" not in repaired["self_attn.q_proj"].facts


def test_a_damping_of_the_users_is_not_repaired():
    settings = replace(HALF, pruner=Convex(damping=1e-5))
    loose, same = run(few_tokens(), settings, Prune()), run(few_tokens(), settings, Prune(), Repair())
    assert max(report.held_out_error or 0 for report in loose.values()) > 1
    assert all(same[name].held_out_error == report.held_out_error for name, report in loose.items())


def test_the_growth_is_that_of_the_largest_weight():
    context, dense = layer_of("llama"), layer_of("llama")
    reports = run(context, replace(HALF, pruner=Convex()), Prune())
    for before, after in zip(dense.layer.operators, context.layer.operators, strict=True):
        growth = float(after.read().abs().max() / before.read().abs().max())
        assert reports[after.name].weight_growth == pytest.approx(growth)
