"""Rows whose outputs move the loss more get more of a matrix's non-zeros, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import on_reports
from torch import Tensor

import convexprune
from convexprune._layerwise.allocation import row_weights
from convexprune._layerwise.capture import stage_inputs
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters import _allocating as allocating
from convexprune.adapters import _gradients as gradients
from convexprune.adapters._gradients import loss_fisher
from convexprune.errors import ModelError

TOKENS = torch.randint(2, 4000, (5, 24), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {
    "method": "sparsegpt", "dataset": TOKENS, "num_calibration_samples": 4, "held_out_samples": 1, "threads": 1,
    "bound_rows": 0,
}  # fmt: skip


def weighted_error(tiny: HuggingFaceModel, number: int, dense: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    """sum_i w_i mean (delta y_i)^2 of the operators of the first stage, on its own inputs."""
    layer, call = tiny.layers[number], tiny.calls(TOKENS[:1])[number]
    (group,), total = layer.stages[0], 0.0
    hidden = tiny.first_inputs(TOKENS[:4])
    for x in stage_inputs(layer, (group,), call, hidden).values():
        for operator in group.operators:
            change = x @ (operator.read() - dense[operator.name]).T
            total += float((change.flatten(0, -2).square().mean(0) * weights[f"{layer.name}.{operator.name}"]).sum())
    return total


@pytest.mark.parametrize("method", ["convex", "admm", "alps", "sparsegpt", "wanda"])
def test_rows_compete_by_how_much_they_move_the_loss(build: Callable[[str], Any], method: str):
    """Weighted errors fall, the others rise; whoever prunes, counts stay exact."""
    found = {}
    fisher = loss_fisher(HuggingFaceModel(build("llama")), TOKENS[:4]).outputs
    weights = {name: row_weights(f) for name, f in fisher.items()}
    for rule in ("uniform", "rows"):
        tiny = HuggingFaceModel(build("llama"))
        dense = {operator.name: operator.read().clone() for operator in tiny.layers[0].operators}
        settings: dict[str, Any] = SETTINGS | {"method": method}
        report = convexprune.prune(tiny.model, allocation=rule, **settings).report
        assert all(o.zeros == o.expected_zeros == o.outputs * o.inputs // 2 for o in report.operators)
        alike = {name: torch.ones_like(w) for name, w in weights.items()}
        found[rule] = [weighted_error(tiny, 0, dense, each) for each in (weights, alike)]
    (weighted, plain), (before, alike) = found["rows"], found["uniform"]
    assert weighted < before and plain > alike


def test_wanda_with_weighted_rows_is_its_scores_weighted(tiny_llama: HuggingFaceModel):
    """The slow twin: |W_ij| sqrt(H_jj) w_i^(1/2), the largest half kept, and what is kept as it was."""
    layer, weights = tiny_llama.layers[0], loss_fisher(tiny_llama, TOKENS[:4]).outputs
    (group,), call = layer.stages[0], tiny_llama.calls(TOKENS[:1])[0]
    dense = {operator: operator.read().clone() for operator in group.operators}
    x = torch.cat(
        [stage_inputs(layer, (group,), call, tiny_llama.first_inputs(ids))[group] for ids in TOKENS[:4].split(1)]
    )
    settings: dict[str, Any] = SETTINGS | {"method": "wanda", "dataset": TOKENS[:4], "held_out_samples": 0}
    convexprune.prune(tiny_llama.model, allocation="rows", **settings)
    for operator, before in dense.items():
        f = weights[f"{layer.name}.{operator.name}"]
        w = (f / f.mean()).clamp_min(0.1).sqrt()
        scores = before.abs() * x.flatten(0, -2).square().mean(0).sqrt() * w.sqrt()[:, None]
        kept = torch.zeros_like(before, dtype=torch.bool).flatten()
        kept[scores.flatten().topk(before.numel() // 2).indices] = True
        pruned = operator.read()
        assert ((pruned != 0) != kept.reshape(pruned.shape)).float().mean() < 0.005  # its weights have three digits
        assert torch.equal(pruned[pruned != 0], before[pruned != 0])


def test_the_weights_of_rows_are_half_of_the_way_and_never_nothing():
    f = torch.tensor([0.0, 1.0, 4.0, 7.0])
    assert row_weights(f).tolist() == pytest.approx([0.1**0.5, (1 / 3) ** 0.5, (4 / 3) ** 0.5, (7 / 3) ** 0.5])
    assert torch.equal(row_weights(torch.zeros(3)), torch.ones(3))  # of an expert that no token reached


@pytest.mark.parametrize("keeps", [True, False])
def test_gradients_need_the_logits_of_few_positions_at_a_time(
    keeps: bool, tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch
):
    """The same whatever there is at once, and of a model that cannot leave logits out."""
    whole = loss_fisher(tiny_llama, TOKENS[:2], 2).outputs
    forward, sizes = tiny_llama.model.forward, list[int]()

    def watched(input_ids: Tensor, use_cache: bool, **more: Any) -> Any:
        found = forward(input_ids=input_ids, use_cache=use_cache, **more)
        sizes.append(found.logits.shape[1])
        return found

    def keeping(input_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
        return watched(input_ids, use_cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr("convexprune.adapters._discovery.passes.POSITIONS", 5)
    monkeypatch.setattr(tiny_llama.model, "forward", keeping if keeps else watched)
    found = loss_fisher(tiny_llama, TOKENS[:2], 2).outputs
    assert sizes == ([5, 5, 5, 5, 3] if keeps else [24])
    assert all(torch.allclose(found[name], f, rtol=1e-5, atol=0) for name, f in whole.items())


def test_gradients_that_are_not_finite_are_told(tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradients, "_loss_gradient", lambda _, __, hidden: torch.full_like(hidden, torch.inf))
    with pytest.raises(ModelError, match=r"at the outputs of .* is not finite.*wider dtype.*'uniform'"):
        convexprune.prune(tiny_llama.model, allocation="rows", **SETTINGS)


def test_a_model_that_cannot_be_differentiated_is_told(tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch):
    """And one that runs out of memory there is not told that."""
    mlp = tiny_llama.layers[0].module.get_submodule("mlp")
    forward, behind = mlp.forward, r".*allocation='uniform'"

    def kernel(x: Tensor) -> Tensor:
        return forward(x).detach()

    def no_backward(x: Tensor) -> Tensor:
        if x.requires_grad:
            raise NotImplementedError("derivative for 'kernel' is not implemented")
        return forward(x)

    def full(x: Tensor) -> Tensor:
        if x.requires_grad:
            raise torch.OutOfMemoryError("full")
        return forward(x)

    place = r"model\.layers\.0 cannot be differentiated: "
    for faulty, why in {kernel: r"no gradient reaches .*\.0\.mlp\.down_proj", no_backward: "derivative for"}.items():
        monkeypatch.setattr(mlp, "forward", faulty)
        with pytest.raises(ModelError, match=place + why + behind):
            loss_fisher(tiny_llama, TOKENS[:2])
    monkeypatch.setattr(mlp, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        loss_fisher(tiny_llama, TOKENS[:2])


def test_rows_need_no_survey_and_a_run_goes_on_with_its_weights(tiny_llama: HuggingFaceModel, tmp_path, monkeypatch):
    dense = tmp_path / "dense"
    tiny_llama.model.save_pretrained(dense)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(allocating, "survey", stop)
    whole = convexprune.prune(dense, allocation="rows", output_dir=tmp_path / "whole", **SETTINGS)
    settings: dict[str, Any] = {"allocation": "rows", "output_dir": tmp_path / "out", **SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, on_progress=on_reports(stop), **settings)
    monkeypatch.setattr(allocating, "loss_fisher", stop)
    convexprune.prune(dense, resume=True, **settings)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other and whole.report.allocation == {"cost": None, "gap": None}
