"""Rotated hidden states: the model computes what it did and N:M removes less of it, or it is refused, and is whole."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_permute import SMALL, equal, state
from tiny_families import FAMILIES, TOKENS, shaken
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import convexprune
from convexprune._cli import app
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._channels import rotating
from convexprune.adapters._channels.rotating import rotated
from convexprune.constraints import SemiStructured
from convexprune.core._rotation import Readers, rotation
from convexprune.errors import ModelError

PATTERN = SemiStructured(2, 4)
OTHERS = TOKENS.flip(0, 1)
REFUSED = {  # and why
    "bloom": "word_embeddings_layernorm", "opt, 350M": "between its layers and its head", "gemma2": "post_feedforward",
    "gemma3_text": "post_feedforward", "olmo2": "post_feedforward", "gemma3": "vision_tower", "llava": "vision_tower",
    "mixtral": "router", "qwen3_moe": "router", "gpt_oss": "router", "llama4_text": "router", "deepseek_v2": "router",
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotating, "rotation", partial(rotation, steps=20))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_computes_what_it_did_or_is_refused(family: str):
    """With grouped queries, biases, norms of queries and keys, tied heads, and one norm before both branches."""
    torch.manual_seed(0)
    model = shaken(FAMILIES[family]())
    before, logits = state(model), model(OTHERS).logits
    if family in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[family]), rotated(HuggingFaceModel(model), TOKENS, PATTERN):
            pass
        assert equal(model, before)
        return
    with rotated(HuggingFaceModel(model), TOKENS, PATTERN) as done:
        pass
    torch.testing.assert_close(model(OTHERS).logits, logits, rtol=1e-4, atol=1e-4)
    assert done.after < 0.98 * done.before and not equal(model, before)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["opt-bf16", "llama-bf16", "llama-tied"])
@torch.no_grad()
def test_other_dtypes_and_tied_heads(build: Callable[[str], Any], name: str):
    model = shaken(build(name))
    logits = model(TOKENS).logits
    with rotated(HuggingFaceModel(model), TOKENS, PATTERN):
        pass
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert float((model(TOKENS).logits - logits).norm() / logits.norm()) < (0.04 if "bf16" in name else 1e-5)


def test_the_scores_are_those_of_the_rotated_operators(tiny_llama: HuggingFaceModel):
    """The slow twin: a rotated model's own weights, and the moments of its own inputs."""
    batches = TOKENS.split(3)
    with rotated(tiny_llama, TOKENS, PATTERN) as done, torch.no_grad():
        frame = rotating._frame(tiny_llama)
        again = rotating._blocks(tiny_llama, batches, frame, PATTERN)
        unit = torch.eye(done.size)
        seen = float(rotating.removed(again, unit, PATTERN))
    torch.testing.assert_close(seen, done.after, rtol=2e-3, atol=0)
    assert sum(isinstance(block, Readers) for block in again) == len(again) / 2 == 4


def test_a_forgotten_axis_is_seen_and_all_is_put_back(build: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch):
    model = build("llama-tied")
    before, whole = state(model), rotating._frame

    def forgetful(adapter: HuggingFaceModel) -> Any:
        frame = whole(adapter)
        channels = rotating.Channels("", frame.channels.size, frame.channels.axes[:-1], frame.channels.consumers)
        return rotating._Frame(channels, frame.norms, frame.keeps_ones)

    monkeypatch.setattr(rotating, "_frame", forgetful)
    with pytest.raises(ModelError, match="computes something else"):
        convexprune.permute(model, rotate=True, **SMALL)
    assert equal(model, before) and model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_failure_after_it_puts_everything_back(build: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch):
    def failing(*_: Any) -> Any:
        raise RuntimeError("planted")

    model = build("opt")
    before = state(model)
    monkeypatch.setattr("convexprune.adapters.find_permutation", failing)
    with pytest.raises(RuntimeError, match="planted"):
        convexprune.permute(model, rotate=True, **SMALL)
    assert equal(model, before)


@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_a_folder_that_transformers_opens_and_that_loses_less(build: Callable[[str], Any], tmp_path: Path, name: str):
    dense = shaken(build(name))
    dense.save_pretrained(tmp_path / "dense")
    result = convexprune.permute(tmp_path / "dense", rotate=True, output_dir=tmp_path / "rotated", **SMALL)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated")
    torch.testing.assert_close(again(OTHERS).logits, dense(OTHERS).logits, rtol=1e-4, atol=1e-4)
    notes = json.loads((tmp_path / "rotated" / "permutation.json").read_text())
    assert result.permutation.rotation is not None and notes["rotation"]["after"] == result.permutation.rotation.after
    prune = partial(convexprune.prune, pattern="2:4", method="sparsegpt", threads=1, **SMALL)
    plain, turned = (prune(tmp_path / folder).report.operators for folder in ("dense", "rotated"))
    ratios = [b.relative_error / a.relative_error for a, b in zip(plain, turned, strict=True)]
    assert sum(ratios) / len(ratios) < 0.95


def test_on_the_command_line(build: Callable[[str], Any], tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "dense")
    options = ["--num-calibration-samples", "2", "--max-seq-length", "16", "--output", str(tmp_path / "rotated")]
    result = CliRunner().invoke(app, ["permute", str(tmp_path / "dense"), "--rotate", *options])
    assert result.exit_code == 0, result.output
    assert "rotated first" in result.output and (tmp_path / "rotated" / "config.json").is_file()
