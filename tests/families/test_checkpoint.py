import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import VOCABULARY, build_family
from transformers import AutoModelForCausalLM

import convexprune
from convexprune.adapters import EMBEDDED, load, save
from convexprune.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


def test_the_embedded_model_loads_in_its_own_precision_or_the_one_asked_for():
    model = load(EMBEDDED, device="cpu")
    assert model.model.dtype == torch.float16
    assert (model.name, model.vocab_size, model.max_positions) == (str(EMBEDDED), 4096, 512)
    assert model.tokenizer is not None
    assert not model.model.training
    assert load(str(EMBEDDED), device="cpu", dtype=torch.float32).model.dtype == torch.float32


def test_a_loaded_model_is_used_in_place(build, tokenizer):
    inner = build("llama")
    model = load(inner, device="cpu", dtype=torch.bfloat16, tokenizer=tokenizer, ignore=["down_proj"])
    assert model.model is inner
    assert inner.dtype == torch.bfloat16
    assert model.tokenizer is tokenizer
    assert "ignored by the recipe" in dict(model.left_alone).values()


def test_a_folder_without_a_tokenizer_has_none(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert load(folder, device="cpu").tokenizer is None


@pytest.mark.parametrize("keep", [0.5, 0.0001])
def test_a_truncated_checkpoint_is_named(folder, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or cut short") as caught:
        load(folder, device="cpu")
    assert caught.value.__cause__ is not None


def test_tensors_that_the_checkpoint_lacks_are_not_made_up(folder, refused):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.0.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with refused("a checkpoint that lacks tensors", r"lacks 1 tensors.*layers\.0\.fc1\.weight"):
        load(folder, device="cpu")


def test_a_tensor_of_another_shape_is_named(folder, refused):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with refused("a tensor of another shape", r"layers\.0\.fc1\.weight has another shape.*, \[1024, 256\]\."):
        load(folder, device="cpu")


def test_pickles_are_read_only_when_they_are_trusted(folder, refused):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with refused("a checkpoint that is only pickles", r"pytorch_model\.bin.*allow_pickle=True"):
        load(folder, device="cpu")
    weight = load(folder, device="cpu", allow_pickle=True).model.get_input_embeddings().weight
    assert torch.equal(weight, tensors["model.decoder.embed_tokens.weight"])  # pyright: ignore[reportArgumentType]


DAMAGE = {
    "has no config.json.* It holds ": "a folder without a configuration",
    "cannot be read": "a configuration that is no JSON",
    "no model of type 't5' that only": "an encoder, or one with a decoder",
    "cannot be read.*lama": "a family that transformers does not know",
    "cannot be read.*model.safetensors": "a folder without weights",
    r"\(tokenizer\): cannot be read": "a damaged tokenizer",
    "no such folder": "a folder that is not there",
}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json.* It holds "),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "no model of type 't5' that only"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "lama"}'), "cannot be read.*lama"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read.*model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"\(tokenizer\): cannot be read"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_folder_is_refused(folder, refused, damage, message):
    damage(folder)
    with refused(DAMAGE[message], message):
        load(folder, device="cpu")


def test_a_folder_of_another_kind_is_told_from_a_model(tmp_path):
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelError, match=r"It holds weights\.gguf\. .*Or give the GGUF file itself, .*weights\.gguf"):
        load(tmp_path, device="cpu")
    (tmp_path / "adapter_config.json").touch()
    for look in (load, convexprune.inspect):
        with pytest.raises(ModelError, match=r"holds an adapter .*Merge it first"):
            look(tmp_path, device="cpu")


def test_a_name_that_the_hub_does_not_give_is_refused():
    with pytest.raises(ModelError, match="nobody/nothing: there is no such folder here, and the hub does not give it"):
        load("nobody/nothing", device="cpu")


def test_saving_and_loading_keeps_every_bit_and_the_tokenizer(tiny, tmp_path):
    tiny.layers[0].operators[-1].read()[:, ::2] = 0
    save(tiny, tmp_path)
    again = load(tmp_path, device="cpu")
    expected = dict(tiny.model.named_parameters())
    assert again.model.dtype == tiny.model.dtype
    assert again.left_alone == tiny.left_alone
    assert all(torch.equal(value, expected[name]) for name, value in again.model.named_parameters())
    assert again.tokenizer is not None
    assert again.tokenizer("one text") == tiny.tokenizer("one text")


def test_what_a_gguf_file_leaves_behind_does_not_stop_saving(tiny_llama, tmp_path):
    class Leftover:
        is_serializable = False
        quantization_config = None

    tiny_llama.model.hf_quantizer = Leftover()  # pyright: ignore[reportAttributeAccessIssue]
    tiny_llama.model.is_quantized = True  # pyright: ignore[reportAttributeAccessIssue]
    tiny_llama.model.config.quantization_config = {"quant_method": "gguf"}
    save(tiny_llama, tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert len(load(tmp_path, device="cpu").layers) == 2


def test_generation_settings_that_contradict_themselves_do_not_lose_the_weights(tiny_llama, tmp_path):
    tiny_llama.model.generation_config.temperature = 0.9
    tiny_llama.model.generation_config.do_sample = False
    save(tiny_llama, tmp_path)
    assert load(tmp_path, device="cpu").model.generation_config.temperature == 0.9
    assert tiny_llama.model.generation_config.do_sample is False


# ---- other ways in


@pytest.mark.parametrize("quantized", ["awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "mxfp4"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_quantized_folder_is_refused_by_its_configuration(folder, quantized: str, stream: bool):
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": quantized}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=rf"quantized \({quantized}\).*Give the model that it was quantized from"):
        load(folder, device="cpu", stream=stream)


TOKENS = torch.randint(2, VOCABULARY - 2, (4, 24), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"dataset": TOKENS, "num_calibration_samples": 4, "method": "wanda", "bound_rows": 0}


def offloaded_to_memory(family: str, folder: Path) -> Any:
    model = build_family(family)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def offloaded_to_disk(family: str, folder: Path) -> Any:
    model = build_family(family)
    model.save_pretrained(folder / "dense")
    owners = [name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    places = {name: "cpu" for name in owners if ".1." not in name}
    places |= {name: "disk" for name in owners if ".1." in name}
    return type(model).from_pretrained(folder / "dense", device_map=places, offload_folder=folder / "kept")


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("offload", [offloaded_to_memory, offloaded_to_disk])
@pytest.mark.parametrize("family", ["opt", "mixtral", "gpt2"])
def test_an_offloaded_model_is_pruned_where_it_is_kept(family: str, offload: Any, tmp_path: Path):
    expected, model = build_family(family), offload(family, tmp_path)
    convexprune.prune(expected, **SMALL)
    assert any(p.is_meta for p in model.parameters())
    convexprune.prune(model, **SMALL, output_dir=tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), expected.parameters(), strict=True))


def test_an_offloaded_model_keeps_its_dtype(refused, tmp_path: Path):
    with refused("another dtype for an offloaded model", r"keeps its dtype, torch\.float32"):
        load(offloaded_to_memory("opt", tmp_path), device="cpu", dtype=torch.bfloat16)


def test_what_is_lost_when_it_is_written_is_noticed(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from convexprune.adapters._discovery import operators

    model = load(offloaded_to_disk("opt", tmp_path), device="cpu")
    monkeypatch.setattr(operators, "_hand_back", lambda *_: None)
    operator = model.layers[1].operators[0]
    with refused(
        "an offloaded weight that is not kept when it is written",
        "q_proj was offloaded, and what is",
    ):
        operator.write(operator.read() * 0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers so
def test_a_model_with_an_adapter_is_refused_until_it_is_merged(refused):
    model = build_family("llama")
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    for source in (wrapped, wrapped.get_base_model()):
        with refused("a model with LoRA or another adapter of peft", r"of peft\. Merge the adapter first"):
            load(source, device="cpu")
    merged = wrapped.merge_and_unload()
    assert all(o.zeros == o.expected_zeros for o in convexprune.prune(merged, **SMALL).report.operators)


def test_a_module_that_is_no_model_of_transformers_is_refused(refused):
    with refused("a module that is not of transformers", "A value of type Linear is no model of transformers"):
        load(torch.nn.Linear(2, 2), device="cpu")  # pyright: ignore[reportArgumentType]


def test_a_gguf_file_is_unpacked_pruned_and_saved_as_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_gguf(tmp_path / "tiny.gguf")
    result = convexprune.prune(path, **SMALL, pattern="2:4", output_dir=tmp_path / "pruned")
    assert "tiny.gguf: its blocks were unpacked to torch.float32" in caplog.text
    assert result.report.sparsity == 0.5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, result.model(TOKENS).logits)


def write_gguf(path: Path) -> Path:
    """A LLaMA of random 8-bit blocks."""
    width, inner, heads = 32, 64, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(256 + i) for i in range(VOCABULARY - 2)), "Āā", "Ăă"])
    writer.add_token_merges(["Ā ā", "Ă ă"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (VOCABULARY, width),
        "output": (VOCABULARY, width),
        **{f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}": (inner, width) for part in ("gate", "up")},
        "blk.0.ffn_down": (width, inner),
    }
    generator = torch.Generator().manual_seed(0)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize((0.2 * torch.randn(shape, generator=generator)).numpy(), q8)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=q8)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(width).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
