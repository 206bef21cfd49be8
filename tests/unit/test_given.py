"""A model comes back from a run as it was given, but for what was asked: it trains; a failed run changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from door import SMALL, TOKENS
from runs import on_reports
from torch import nn
from transformers import PreTrainedModel

import convexprune
from convexprune.core._penalty import L1
from convexprune.core._problem import Problem
from convexprune.errors import ConvexpruneError, ModelError
from convexprune.solvers import AbstractSolver, Solution
from convexprune.solvers._fista import FISTA

QUICK: dict[str, Any] = SMALL | {"method": "wanda"}
PERMUTE = {"dataset": TOKENS, "num_calibration_samples": 6}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def step(model: PreTrainedModel) -> float:
    """One of an optimiser, on the loss of a few tokens."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loss = model(TOKENS, labels=TOKENS).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def as_given(build: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """A model in training, with gradients, in which an embedding is frozen and one layer is in evaluation mode."""
    model = build("llama").train()
    model.model.layers[1].eval()
    model.get_input_embeddings().requires_grad_(False)
    step(model)
    return model


def held(model: PreTrainedModel) -> list[torch.Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*(p.detach() for p in model.parameters()), *gradients, *model.buffers()]


def ways(model: PreTrainedModel) -> tuple[list[bool], list[bool]]:
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("door", ["prune", "permute"])
def test_modes_and_gradients_come_back_and_the_result_trains(build, tmp_path: Path, door: str, whole: bool):
    model, expected = as_given(build), ways(as_given(build))
    settings = {"output_dir": None if whole else tmp_path / "out"}
    result = getattr(convexprune, door)(model, **(QUICK if door == "prune" else PERMUTE), **settings)
    assert result.model is model and ways(model) == expected
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before = bits(model)
    losses = [step(model) for _ in range(5)]
    assert losses[-1] < losses[0] and not same(model, before)


@pytest.mark.parametrize("door", ["prune", "permute"])
def test_a_result_that_is_read_from_its_folder_trains(dense: Path, tmp_path: Path, door: str):
    settings = (QUICK if door == "prune" else PERMUTE) | {"dataset": TOKENS % 500, "output_dir": tmp_path / "out"}
    model = getattr(convexprune, door)(dense, **settings).model
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(TOKENS % 500, labels=TOKENS % 500).loss.backward()
    optimizer.step()


def test_a_model_that_is_refused_comes_back_as_it_was(build):
    model, expected = as_given(build), ways(as_given(build))
    before = bits(model)
    with pytest.raises(ModelError, match="Unknown operator"):
        convexprune.prune(model, targets=["nothing"], **QUICK)
    assert ways(model) == expected and same(model, before)


@pytest.mark.parametrize("door", ["prune", "permute"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tokens", "huge", "message"),
    [
        ("bfloat16", TOKENS + 10**6, 1.0, "Token ids from"),
        ("float16", TOKENS, 1e6, "NaN or infinite"),  # in float16
    ],
)
def test_a_refused_model_is_not_rounded(
    build, tmp_path: Path, door: str, whole: bool, dtype: str, tokens: Any, huge: float, message: str
):
    model = as_given(build)
    model.lm_head.weight.data[0, 0] = huge
    expected, before = ways(model), [each.clone() for each in held(model)]
    settings = {"dataset": tokens, "num_calibration_samples": 6, "output_dir": None if whole else tmp_path / "out"}
    with pytest.raises(ConvexpruneError, match=message):
        getattr(convexprune, door)(model, dtype=dtype, **settings)
    assert ways(model) == expected
    for each, other in zip(held(model), before, strict=True):
        assert each.dtype == other.dtype and torch.equal(each, other)


class Failing(AbstractSolver):
    """Solves as FISTA does, and raises once it is asked for the `last` time."""

    def __init__(self, last: int, error: BaseException) -> None:
        self.left, self.error = last, error

    @property
    def penalties(self):
        return (L1,)

    def solve(self, problem: Problem, start: torch.Tensor | None = None) -> Solution:
        self.left -= 1
        if not self.left:
            raise self.error
        return FISTA(max_iterations=3, check_every=10).solve(problem, start)


@pytest.mark.parametrize(("prefix", "dtype"), [("dense", None), ("pruned", None), ("dense", "bfloat16")])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_run_that_fails_in_the_middle_leaves_the_model_as_it_was(build, error: Any, prefix: str, dtype: Any):
    model = as_given(build)
    before, expected, pruned = bits(model), ways(model), []
    solver = Failing(7 * 2 + 1, error)  # the second stage of the second layer has begun
    settings = SMALL | {"method_args": {"rounds": 2}, "prefix": prefix, "dtype": dtype}
    with pytest.raises(type(error)):
        convexprune.prune(model, solver=solver, on_progress=on_reports(pruned.append), **settings)
    assert len(pruned) > 7
    assert same(model, before) and ways(model) == expected


def test_an_error_after_pruning_undoes_it_too_and_the_folder_can_be_gone_on_with(build, tmp_path: Path, monkeypatch):
    model = build("llama")
    before = bits(model)
    with monkeypatch.context() as patch:
        patch.setattr("convexprune.adapters.save_from_store", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convexprune.prune(model, output_dir=tmp_path / "out", **QUICK)
    assert same(model, before)
    result = convexprune.prune(model, output_dir=tmp_path / "out", resume=True, **QUICK)
    assert result.model is model and result.report.sparsity == 0.5
    assert (model.model.layers[1].mlp.up_proj.weight == 0).double().mean() == 0.5
