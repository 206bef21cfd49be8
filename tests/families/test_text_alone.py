"""A checkpoint of text and images of which transformers reads the text alone: of Llama 4, say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from packaging.version import Version
from tiny_families import SMALL, TOKENS, build_family, on_disk

import convexprune
from convexprune.errors import ModelError
from convexprune.validation import verify

VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
}  # fmt: skip

reads_text = pytest.mark.skipif(
    Version(t.__version__) < Version("5.15"),
    reason="transformers 4.57 makes no text model of this configuration, and 5.0 no model at all",
)


def with_images() -> Any:
    config = t.Llama4Config(text_config=build_family("llama4_text").config.to_dict(), vision_config=VISION)
    torch.manual_seed(0)
    return t.Llama4ForConditionalGeneration(config).eval()


@reads_text
@pytest.mark.parametrize(
    ("pattern", "setting", "sizes"),
    [
        ("channels:8", "intermediate_size", [24, 16]),
        ("experts", "num_local_experts", [4, 3]),
        ("heads", "num_key_value_heads", [2, 1]),
        ("layers", "num_hidden_layers", [3, 2]),
    ],
)
def test_the_text_becomes_smaller_and_all_around_it_stays(pattern: str, setting: str, sizes: list[int], tmp_path: Path):
    with_images().save_pretrained(tmp_path / "dense")
    share = {"pattern": pattern, "sparsity": 0.25 if pattern == "experts" else 0.4}
    result = convexprune.prune(tmp_path / "dense", **SMALL | share, output_dir=tmp_path / "out")
    assert (result.report.narrowed or {})[f"text_config.{setting}"] == sizes
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == "llama4" and said["text_config"][setting] == sizes[1]
    smaller = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = t.Llama4ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(result.model(TOKENS).logits, smaller(TOKENS).logits)
    assert torch.equal(whole.language_model(TOKENS).logits, smaller(TOKENS).logits)
    dense, found = on_disk(tmp_path / "dense"), on_disk(tmp_path / "out")
    around = [name for name in dense if not name.startswith("language_model.")]
    assert around and all(torch.equal(found[name], dense[name]) for name in around)
    here = convexprune.prune(tmp_path / "dense", **SMALL | share)
    assert torch.equal(here.model(TOKENS).logits, smaller(TOKENS).logits)
    assert verify(tmp_path / "out", dataset=TOKENS, sample=1).passed


@reads_text
def test_what_is_left_out_in_memory_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A checkpoint that does not stream is loaded whole, and its result is the text alone."""
    with_images().save_pretrained(tmp_path / "dense")
    convexprune.prune(tmp_path / "dense", **SMALL, method="wanda")
    assert "reads its text alone; what is saved from memory has no images" in caplog.text


def test_a_model_that_fails_in_its_own_forward_pass_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    """As Llama 4 with images does in transformers 5.24."""

    def lacking(*_: Any, **__: Any) -> Any:
        raise AttributeError("no attribute 'image_outputs'")

    model = build_family("llama")
    monkeypatch.setattr(model.model, "forward", lacking)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM fails on a batch of tokens: no attribute .* token ids"):
        convexprune.prune(model, **SMALL, method="wanda")
