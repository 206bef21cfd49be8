"""Which models are refused for their weights, and which weights are left alone: tied ones and the head."""

from pathlib import Path

import pytest
import torch
from runs import TOKENS
from safetensors.torch import load_file, save_file
from test_gguf import SIZES, built, exported
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

import convexprune
from convexprune.adapters import HuggingFaceModel, load
from convexprune.errors import ModelError


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt", "tied to model.decoder.embed_tokens.weight"),
        ("llama-tied", "tied to model.embed_tokens.weight"),
        ("llama", "not inside a decoder layer"),
    ],
)
def test_the_head_is_left_alone_for_the_right_reason(build, name, reason):
    assert HuggingFaceModel(build(name)).left_alone == [("lm_head", reason)]


def test_an_operator_whose_memory_another_layer_uses_is_left_alone(build):
    model = build("llama")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = nn.Parameter(first.weight.data[:, :])  # another parameter on the same memory
    left = dict(HuggingFaceModel(model).left_alone)
    assert left["model.layers.0.mlp.up_proj"] == "tied to model.layers.1.mlp.up_proj.weight"
    assert left["model.layers.1.mlp.up_proj"] == "tied to model.layers.0.mlp.up_proj.weight"


def test_separate_pieces_of_one_storage_are_not_tied(build):
    model = build("llama")
    attention = model.model.layers[0].self_attn
    together = torch.cat([attention.k_proj.weight.data, attention.v_proj.weight.data])
    attention.k_proj.weight, attention.v_proj.weight = (nn.Parameter(half) for half in together.chunk(2))
    assert [name for name, _ in HuggingFaceModel(model).left_alone] == ["lm_head"]


def test_weights_that_were_made_in_inference_mode_are_refused(build):
    model = build("llama")
    with torch.inference_mode():
        model.model.norm.weight = nn.Parameter(torch.ones(8), requires_grad=False)
    with pytest.raises(ModelError, match=r"model\.norm\.weight was made inside torch\.inference_mode"):
        HuggingFaceModel(model)
    with torch.no_grad():
        HuggingFaceModel(build("llama"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(build, refused, value):
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 3] = value
    with refused("NaN or infinity in a weight", r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 of 1,536"):
        HuggingFaceModel(model)


def test_weights_that_were_never_loaded_are_refused_whichever_way_they_come(build, refused):
    model = build("llama").to("meta")
    with pytest.raises(ModelError, match="meta device"):
        HuggingFaceModel(model)
    with refused("weights that were never loaded", "meta device"):
        load(model, device="cpu")


def test_quantized_models_are_refused_and_dequantized_ones_are_not(build, refused):
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    assert len(HuggingFaceModel(model).layers) == 2
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with refused("a quantized model (of any method but GGUF)", r"quantized \(bitsandbytes\)"):
        HuggingFaceModel(model)


def test_weights_that_are_no_floating_numbers_are_refused(build, refused):
    model = build("llama")
    codes = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(codes, requires_grad=False)
    with refused("weights that are integers", r"1\.self_attn\.q_proj\.weight.*of type torch\.int8"):
        HuggingFaceModel(model)


@pytest.mark.parametrize("streamed", [True, False])
def test_weights_that_are_stored_as_integers_are_refused_before_any_work(build, tmp_path, streamed: bool):
    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is stored as I8; accepted: F16, BF16, F32, F64"):
        convexprune.prune(tmp_path, dataset=TOKENS, output_dir=tmp_path.with_name("out") if streamed else None)


def test_a_model_without_its_head_can_be_pruned(build):
    assert HuggingFaceModel(LlamaModel(build("llama").config)).layers[1].name == "layers.1"


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
