"""The operator that closes a decoder layer is found by watching, and makes up for all that the layer's output lacks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_contexts import context_of, pruned
from tiny_families import VOCABULARY, build_family
from torch import Tensor

from convexprune._layerwise.capture import Calls
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.model import DecoderLayer
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.walk import LayerWalk
from convexprune._layerwise.work import Work, prune_layer
from convexprune.adapters import HuggingFaceModel
from convexprune.constraints import Unstructured
from convexprune.pruners import SparseGPT
from convexprune.recipe import make_recipe
from convexprune.report import OperatorReport

TOKENS = torch.randint(2, VOCABULARY - 2, (6, 24), generator=torch.Generator().manual_seed(0))


def context_in(family: str, **settings: Any) -> LayerContext:
    name, _, bfloat16 = family.partition(", in ")
    model = build_family(name).eval()
    model = HuggingFaceModel(model.to(torch.bfloat16) if bfloat16 else model, **settings)
    return context_of(model, TOKENS, batch=2)


def prune(context: LayerContext, share: float = 0.5, **settings: Any) -> list[OperatorReport]:
    return pruned(context, LayerSettings(SparseGPT(), Unstructured(share), **settings))


@pytest.mark.parametrize(
    ("family", "settings", "name"),
    [
        ("llama", {}, "mlp.down_proj"),
        ("llama, in bfloat16", {}, "mlp.down_proj"),
        ("llama", {"ignore": ["re:.*o_proj"]}, "mlp.down_proj"),
        ("llama", {"ignore": ["re:.*down_proj"]}, None),
        ("opt", {}, "fc2"),
        ("opt", {"targets": ["re:.*fc1"]}, None),
        ("gpt2", {}, "mlp.c_proj"),
        ("gpt_neox, sequential", {}, "mlp.dense_4h_to_h"),
        ("gpt_neox", {}, None),  # two of them, side by side
        ("gemma3_text", {}, None),  # behind a norm
        ("mixtral", {}, None),  # experts
    ],
)
def test_who_closes_a_layer_is_found(family: str, settings: dict[str, Any], name: str | None):
    context = context_in(family, **settings)
    layer, observed = context.layer, context.observe(("residual_stream",))
    assert (observed.last_branch and observed.last_branch.operators[0].name) == name
    token_aligned = {group for group in layer.groups if group.token_aligned}
    assert set(observed.inputs) == token_aligned - {observed.last_branch}, "what nobody asks for is not kept"
    assert set(context.observe(("residual_stream", "operator")).inputs) == token_aligned
    assert context.observe().last_branch is None


@pytest.mark.parametrize("correction", [0.5, 1.0])
@pytest.mark.parametrize("prefix", ["dense", "pruned"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox, sequential"])
def test_its_error_is_that_of_the_layers_output(family: str, prefix: Any, correction: float):
    """Its target is y_W + a (y - y_W): y of the dense layer, y_W of the pruned one with its own weight dense."""
    context = context_in(family)
    layer, calls, dense = context.layer, context.calls, context.inputs["dense"]
    noise = torch.Generator().manual_seed(1)
    fed = list(dense) if prefix == "dense" else [x + 0.1 * torch.randn(x.shape, generator=noise) for x in dense]
    context = replace(context, inputs={"dense": dense, "pruned": fed}, held_out=1)
    last = layer.groups[-1].operators[0]
    before = last.read().clone()
    settings = {"error_target": "residual_stream", "prefix": prefix, "correction": correction}
    *others, report = prune(context, **settings)
    assert [r.facts.get("corrects_layer") for r in (*others, report)] == [None] * len(others) + [1]
    achieved, after = outputs(layer, calls, fed), last.read().clone()
    last.write(before)
    same = outputs(layer, calls, fed)
    last.write(torch.zeros_like(before))
    rest = outputs(layer, calls, fed)
    wanted = torch.stack(list(context.observed.outputs)).double()
    for error, part in ((report.relative_error, slice(0, -1)), (report.held_out_error, slice(-1, None))):
        target = torch.lerp(same[part], wanted[part], correction)
        energy = (wanted - rest)[part].square().sum()
        assert error == pytest.approx(float((achieved[part] - target).square().sum() / energy), rel=1e-3)
    assert not torch.equal(before, after)


def outputs(layer: DecoderLayer, calls: Calls, fed: list[Tensor]) -> Tensor:
    """Of the layer as it is [batches tokens m], in float64."""
    with torch.no_grad():
        return torch.stack([calls(x)(layer.module, x) for x in fed]).double()


@pytest.mark.parametrize("prefix", ["dense", "pruned"])
def test_nothing_lacks_where_nothing_is_pruned(prefix: Any):
    reports = prune(context_in("llama"), share=0.0, prefix=prefix, error_target="residual_stream")
    assert [report.relative_error for report in reports] == [0.0] * 7


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "mixtral"])
def test_where_no_operator_closes_all_aim_at_their_own_outputs(family: str):
    results = []
    for error_target in ("residual_stream", "operator"):
        context = context_in(family)
        prune(context, error_target=error_target)
        results.append([operator.read().clone() for operator in context.layer.operators])
    assert all(map(torch.equal, *results))


def test_the_others_are_pruned_the_same():
    results = []
    for error_target in ("residual_stream", "operator"):
        context = context_in("llama")
        prune(context, error_target=error_target)
        results.append({operator.name: operator.read().clone() for operator in context.layer.operators})
    assert [name for name, w in results[0].items() if not torch.equal(w, results[1][name])] == ["mlp.down_proj"]


@pytest.mark.parametrize(
    ("given", "correction", "target"),
    [
        ({}, 1.0, "residual_stream"),
        ({"prefix": "pruned"}, 0.5, "residual_stream"),
        ({"prefix": "pruned", "error_correction": True}, 1.0, "residual_stream"),
        ({"prefix": "pruned", "error_correction": 0}, 0.0, "residual_stream"),
        ({"preset": "fistapruner"}, 1.0, "operator"),
        ({"method": "fistapruner", "prefix": "pruned"}, 0.5, "operator"),
        ({"method": "fistapruner", "error_target": "residual_stream"}, 1.0, "residual_stream"),
        ({"error_target": None, "error_correction": None}, 1.0, "residual_stream"),
    ],
)
def test_what_a_recipe_corrects_follows_from_its_other_settings(given: Any, correction: float, target: str):
    recipe = make_recipe(model="", **given)
    assert (recipe.error_correction, recipe.error_target) == (correction, target)
    settings = recipe.layer_settings()
    assert (settings.correction, settings.error_target, settings.prefix) == (correction, target, recipe.prefix)


def test_a_layer_that_is_finished_before_the_one_before_it_leaves_what_that_one_aims_at(tmp_path: Path):
    settings = LayerSettings(SparseGPT(), Unstructured(0.5), error_target="residual_stream")
    work = Work(TOKENS[:4], TOKENS[4:], 2, settings)

    def task(number: int, folder: Path, on_operator: Callable[[OperatorReport], None] = lambda _: None) -> None:
        model = HuggingFaceModel(build_family("llama").eval())
        store = FolderStore(folder, 2)
        LayerWalk(model, work.batches, store).visit(number, partial(prune_layer, store, work, on_operator))

    def overtake(report: OperatorReport) -> None:
        if not FolderStore(tmp_path / "overtaken", 2).is_finished(1):
            task(1, tmp_path / "overtaken")

    for number in (0, 1):
        task(number, tmp_path / "in order")
    task(0, tmp_path / "overtaken", overtake)
    for number in (0, 1):
        expected, found = (FolderStore(tmp_path / folder, 2).layer(number) for folder in ("in order", "overtaken"))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    for folder in ("in order", "overtaken"):
        assert list((tmp_path / folder / "hidden").iterdir()) == []
