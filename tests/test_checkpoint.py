import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_tensors_that_the_checkpoint_lacks_are_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.0.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*layers\.0\.fc1\.weight"):
        load(folder, device="cpu")


def test_pickles_are_read_only_when_they_are_trusted(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*allow_pickle=True"):
        load(folder, device="cpu")
    weight = load(folder, device="cpu", allow_pickle=True).model.get_input_embeddings().weight
    assert torch.equal(weight, tensors["model.decoder.embed_tokens.weight"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "no model of type 't5' that only"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "lama"}'), "cannot be read.*lama"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read.*model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"\(tokenizer\): cannot be read"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(folder, device="cpu")


def test_a_name_that_the_hub_does_not_give_is_refused():
    with pytest.raises(ModelError, match="nobody/nothing: cannot be read"):
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
