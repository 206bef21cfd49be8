"""Calibration tokens that count for more than others: found, applied everywhere, the same bits however it is run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SETTINGS, TOKENS, checksums, flip, place_of, require_resumed, stop_after
from test_compare import compared, folder
from tiny_families import build_family
from torch import Tensor

import convexprune
from convexprune._layerwise.settings import SINK, TokenWeighting, loss_weights, sink_weights
from convexprune._progress import Event, followed_by
from convexprune.adapters import HuggingFaceModel, load
from convexprune.adapters import _allocating as adapter
from convexprune.adapters import _gradients as gradients
from convexprune.adapters._allocating import read_by_other_tokens, token_weights
from convexprune.adapters._gradients import loss_fisher
from convexprune.errors import RecipeError
from convexprune.recipe import make_recipe
from convexprune.report import OperatorReport
from convexprune.validation import verify

__all__ = ["folder"]  # a fixture of test_compare

SINKS: dict[str, Any] = SETTINGS | {"token_weights": "attention_sink:0.5"}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"k_proj", "v_proj"}),
        ("opt", {"k_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("mixtral", {"k_proj", "v_proj"}),
    ],
)
def test_keys_and_values_are_what_other_tokens_read(family: str, names: set[str]):
    model = HuggingFaceModel(build_family(family))
    found = read_by_other_tokens(model)
    assert len(found) == len(model.layers) * len(names)
    assert {name.rpartition(".")[2] for name in found} == names


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_first_tokens_have_their_share_of_the_weight(share: float):
    weights = sink_weights(3, 16, share)
    torch.testing.assert_close(weights.sum(1), torch.full((3,), 16.0))
    torch.testing.assert_close(weights[:, :SINK].sum(1), torch.full((3,), 16 * share))
    assert bool((sink_weights(2, SINK, share) == 1).all())  # there are no others


@pytest.mark.parametrize("text", ["first", "none:0.5", "attention_sink:1", "attention_sink:x", "attention_sink:-0.1"])
def test_other_weightings_are_refused(text: str):
    with pytest.raises(RecipeError, match="token"):
        convexprune.prune(token_weights=text)
    assert TokenWeighting.parse("attention_sink:0.25") == TokenWeighting("attention_sink", 0.25)


def test_left_out_they_are_those_of_sinks_for_our_codes_only():
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "none"),
        ({"quantize": "int4"}, "attention_sink"),
        ({"quantize": "int4", "token_weights": "none"}, "none"),
        ({"quantize": "int4", "quantizer": "gptq"}, "none"),
        ({"quantize": "int4", "method": "sparsegpt"}, "none"),
        ({"quantize": "int4", "preset": "fistapruner"}, "none"),
        ({"bits": 3.3}, "none"),
    ]
    for given, expected in cases:
        assert make_recipe(**given).token_weights == expected


def _pruned(dense: Path, folder: Path, **settings: Any) -> list[OperatorReport]:
    return convexprune.prune(dense, output_dir=folder, **settings).report.operators


def test_only_keys_and_values_change_and_their_reports_have_both_errors(dense: Path, tmp_path: Path):
    plain = _pruned(dense, tmp_path / "plain", **SETTINGS)
    weighted = _pruned(dense, tmp_path / "weighted", **SINKS)
    assert [o.name for o in plain] == [o.name for o in weighted]
    for before, after in zip(plain[:3], weighted[:3], strict=True):  # of the first layer's first stage
        if before.name.endswith("q_proj"):
            assert (after.relative_error, after.weighted_error) == (before.relative_error, None)
            continue
        assert after.tokens == before.tokens and before.weighted_error is None
        assert after.weighted_error is not None and after.weighted_error < after.relative_error  # it is fitted
        assert before.relative_error < after.relative_error < 2 * before.relative_error


def test_verify_measures_the_weighted_errors_again(dense: Path, tmp_path: Path):
    _pruned(dense, tmp_path / "out", **SINKS)
    operators = ["model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.k_proj", "model.layers.1.mlp.up_proj"]
    found = verify(tmp_path / "out", dataset=TOKENS, rows=1, columns=4, bound_rows=1, operators=operators)
    assert len(found.errors) == 3 and not found.faults


@pytest.mark.parametrize("streams", [True, False])
def test_loss_weights_follow_the_squared_gradients_of_tokens(dense: Path, streams: bool, monkeypatch):
    monkeypatch.setattr(gradients, "TOGETHER", 40)  # two windows at once, so that three parts are read
    source, events = load(dense, device="cpu", stream=streams), list[Event]()
    with followed_by(events.append):
        found = token_weights(source, TokenWeighting("loss", 0.75), TOKENS, 2)
    parts, ahead, back = 3, range(1, 5), range(4 + gradients.BACKWARD, 4 + 5 * gradients.BACKWARD, gradients.BACKWARD)
    whole = back[-1]
    done = [part * whole + step for part in range(parts) for step in (*ahead, *back)]
    assert [(event.done, event.total) for event in events] == [(step, parts * whole) for step in (0, *done)]
    model, name = load(dense, device="cpu").model, "model.layers.2.self_attn.v_proj"
    squares = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        output.requires_grad_().register_hook(lambda gradient: squares.append(gradient[0].square().sum(1)))

    with model.get_submodule(name).register_forward_hook(keep):
        for window in TOKENS:
            logits = model(window[None]).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
    expected = torch.stack(squares)
    torch.testing.assert_close(found[name], 0.25 + 0.75 * expected / expected.mean(), rtol=1e-4, atol=1e-5)
    assert len(found) == 4 * 7


@pytest.mark.long
def test_workers_and_a_resumed_run_give_the_same_bits(dense: Path, tmp_path: Path, monkeypatch):
    weighted: dict[str, Any] = SETTINGS | {"token_weights": "loss"}
    _pruned(dense, tmp_path / "one", **weighted)
    _pruned(dense, tmp_path / "two", executor="pool", workers=2, **weighted)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")
    require_resumed(dense, tmp_path, **weighted)
    asked = []
    monkeypatch.setattr(adapter, "loss_fisher", lambda *args, **named: asked.append(1) or loss_fisher(*args, **named))
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, output_dir=tmp_path / "damaged", on_progress=stop_after(1), **weighted)
    flip(place_of(tmp_path / "damaged") / "work" / "token_weights.safetensors")
    asked.clear()
    convexprune.prune(dense, output_dir=tmp_path / "damaged", resume=True, **weighted)
    assert asked and checksums(tmp_path / "one") == checksums(tmp_path / "damaged")


def test_tokens_without_gradients_count_alike():
    assert bool((loss_weights(torch.zeros(2, 3), 0.5) == 1).all())


@pytest.mark.parametrize("convention", ["dense-half", "pruned-own"])
def test_a_rival_gets_the_same_weights_in_a_row_of_its_own(folder: Path, convention: str):
    methods = ["sparsegpt", "sparsegpt:token_weights=attention_sink"]
    result = compared(folder, methods=methods, conventions=[convention])
    plain, weighted = (row["operators"] for row in result["rows"])
    errors = {o["name"]: (o["relative_error"], o["weighted_error"]) for o in weighted}
    changed = {o["name"] for o in plain if errors[o["name"]] != (o["relative_error"], None)}
    first = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert first & changed == first - {"model.layers.0.self_attn.q_proj"}
