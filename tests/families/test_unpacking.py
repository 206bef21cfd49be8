"""A GGUF file is read as the model that it holds, or refused."""

from pathlib import Path

import pytest
import torch
from test_gguf import SIZES, built, exported
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from convexprune.adapters import load
from convexprune.errors import ModelError


@pytest.mark.parametrize(
    ("family", "named"), [("llama3", r"rope_freqs\.weight"), ("qwen2-yarn", r"qwen2\.rope\.scaling\.type")]
)
def test_scaled_rotary_embeddings_that_transformers_leaves_out_are_refused(family: str, named: str, tmp_path: Path):
    path = exported(built(family, tmp_path / "dense"), tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=rf"leaves out the scaling of its rotary embeddings \({named}\)"):
        load(path, device="cpu")


def test_biases_that_transformers_leaves_out_are_refused(tmp_path: Path):
    LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(tmp_path / "dense")
    path = exported(tmp_path / "dense", tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"leaves out biases \(blk\.0\.attn_k\.bias\)"):
        load(path, device="cpu")


def test_biases_that_the_model_has_are_read(tmp_path: Path, tokenizer):
    source = built("qwen2", tmp_path / "dense")
    read = load(exported(source, tmp_path / "model.gguf"), device="cpu", tokenizer=tokenizer).model
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(read(tokens).logits, AutoModelForCausalLM.from_pretrained(source)(tokens).logits)
