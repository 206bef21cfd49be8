"""A token whose residual stream dwarfs all others: it counts for a few, so that the others are fitted, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layer_contexts import context_of, pruned
from runs import SETTINGS
from tiny_families import build_family

import convexprune
from convexprune._layerwise import stages
from convexprune._layerwise.settings import LayerSettings, Refinement, sink_weights
from convexprune._layerwise.stages import MASSIVE, massive_token_weights, without_massive
from convexprune._layerwise.steps.survey import survey
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._gradients import loss_fisher
from convexprune.constraints import Unstructured
from convexprune.pruners import Magnitude

WINDOWS = torch.randint(2, 128, (8, 24), generator=torch.Generator().manual_seed(0))
WINDOWS[:, 5] = 1
ASKED: Any = SETTINGS | {"dataset": WINDOWS, "num_calibration_samples": 8, "sparsity": 0.5}


def with_a_massive_token(folder: Path) -> Path:
    """Save a model whose first layer makes of token 1 what dwarfs all others."""
    model = build_family("llama")
    layer, embedding = model.model.layers[0], model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:, 0] = layer.self_attn.o_proj.weight[0] = 0  # only the token itself is seen by the first inner unit
        embedding[1, 0] = embedding[1].norm()
        for operator in layer.mlp.gate_proj, layer.mlp.up_proj:
            operator.weight[0] = 0
            operator.weight[0, 0] = 10
    model.save_pretrained(folder)
    return folder


def test_its_weight():
    """A massive token counts for `MASSIVE` median tokens."""
    stream = torch.ones(2, 5, 3)
    stream[0, 0] *= 1000
    stream[1, 2] *= 3  # nine times the energy is not massive
    x, error = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    counted, lacking = without_massive(stream, x, error)
    assert lacking is not None
    expected = torch.ones(2, 5, 1)
    expected[0, 0] = MASSIVE / 1000**2
    torch.testing.assert_close((counted / x).square(), expected.expand_as(x))
    torch.testing.assert_close((lacking / error).square(), expected.expand_as(error))
    assert torch.equal(counted[1], x[1]) and torch.equal(counted[0, 1:], x[0, 1:])


def test_tokens_without_energy_are_not_the_measure():
    """Most of a sample may be padding, whose stream can be zero."""
    stream = torch.zeros(2, 7, 3)
    stream[0, 4:] = 1
    stream[0, 6] = 100
    counted = massive_token_weights(stream)
    assert counted is not None and counted.tolist() == [[1] * 6 + [pytest.approx(MASSIVE / 100**2)], [1] * 7]
    assert massive_token_weights(torch.zeros(2, 7, 3)) is None


def test_without_a_massive_token_nothing_changes():
    x = torch.randn(2, 5, 4, dtype=torch.bfloat16)
    found, error = without_massive(torch.randn(2, 5, 3), x, None)
    assert found is x and error is None


@pytest.mark.parametrize("target", ["residual_stream", "operator"])
def test_only_errors_of_the_residual_stream_count_it_less(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, errors = with_a_massive_token(tmp_path / "dense"), list[float]()
    for limit in (MASSIVE, float("inf")):
        monkeypatch.setattr(stages, "MASSIVE", limit)
        errors += [
            o.relative_error for o in convexprune.prune(source, **ASKED | {"error_target": target}).report.operators
        ]
    half = len(errors) // 2
    assert (errors[:half] == errors[half:]) == (target == "operator")


@pytest.mark.parametrize("method", ["convex", "sparsegpt"])
def test_other_tokens_are_fitted_beside_a_massive_one(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = with_a_massive_token(tmp_path / "dense")
    dense = convexprune.load(source)
    with torch.no_grad():
        expected = dense(WINDOWS, output_hidden_states=True).hidden_states[1]
    energy = expected.square().mean(-1)
    assert bool((energy[:, 5] > 1000 * energy.median(1).values).all())
    others = WINDOWS != 1

    def error_of_others() -> float:
        model = convexprune.prune(source, **ASKED | {"method": method}).model
        with torch.no_grad():
            found = model(WINDOWS, output_hidden_states=True).hidden_states[1]
        return float((found - expected)[others].square().sum() / expected[others].square().sum())

    error = error_of_others()
    monkeypatch.setattr(stages, "MASSIVE", float("inf"))
    assert error < 0.8 * error_of_others()


@pytest.mark.parametrize("target", ["residual_stream", "operator"])
def test_a_refined_layer_counts_it_less_likewise(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, errors = with_a_massive_token(tmp_path / "dense"), list[float]()
    for limit in (MASSIVE, float("inf")):
        monkeypatch.setattr(stages, "MASSIVE", limit)
        run = convexprune.prune(source, **ASKED | {"method": "magnitude", "error_target": target, "refine": "layer"})
        errors.append(next(iter(run.report.operators)).facts["refine_error_before"])
    assert (errors[0] == errors[1]) == (target == "operator")


def test_a_refined_layer_multiplies_it_with_other_weights_of_tokens(tmp_path: Path):
    context = context_of(HuggingFaceModel(convexprune.load(with_a_massive_token(tmp_path / "dense"))), WINDOWS, batch=2)
    layer, given = context.layer, sink_weights(8, 24, 0.5)
    settings = LayerSettings(
        Magnitude(), Unstructured(0.5), error_target="residual_stream", refinement=Refinement.parse("layer"),
        token_weights={f"{layer.name}.{layer.operators[-1].name}": given},
    )  # fmt: skip
    report = pruned(context, settings)[0]
    now, dense = torch.cat(list(context.outputs())), torch.cat(list(context.observed.outputs))
    massive, added = massive_token_weights(dense), dense - torch.cat(list(context.inputs["dense"]))
    assert massive is not None
    errors, energies = ((massive * given * each.square().sum(-1)).sum() for each in (now - dense, added))
    assert report.facts["refine_error"] == pytest.approx(float(errors / energies), rel=1e-4)


def test_the_cost_of_zeros_counts_it_less_where_a_layer_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = HuggingFaceModel(convexprune.load(with_a_massive_token(tmp_path / "dense")))
    fisher, half = loss_fisher(model, WINDOWS).outputs, Unstructured(0.5)
    capped = survey(model, WINDOWS.split(1), 0, [half], fisher)
    monkeypatch.setattr(stages, "MASSIVE", float("inf"))
    plain = survey(model, WINDOWS.split(1), 0, [half], fisher)
    changed = {one.name for one, other in zip(capped, plain, strict=True) if one.costs != other.costs}
    assert changed == {f"{layer.name}.mlp.down_proj" for layer in model.layers}


def test_a_run_with_a_massive_token_is_verified(tmp_path: Path):
    source, run = with_a_massive_token(tmp_path / "dense"), tmp_path / "run"
    convexprune.prune(source, output_dir=run, **ASKED)
    assert convexprune.verify(run, dataset=WINDOWS).passed
