"""Layer by layer out of the shards is the same, bit for bit, as with the whole model in memory."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import checksums
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, build_family
from torch import Tensor
from transformers import AutoModelForCausalLM

import convexprune
from convexprune._layerwise import pipeline as room
from convexprune._storage.tensors import entries
from convexprune.adapters import HuggingFaceModel, load
from convexprune.adapters._discovery.passes import logits_at
from convexprune.errors import ModelError

TOKENS = torch.randint(2, 4000, (6, 24), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {
    "dataset": TOKENS, "num_calibration_samples": 4, "held_out_samples": 1, "threads": 1, "bound_rows": 0,
}  # fmt: skip


def state(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.fixture
def dense(tiny: HuggingFaceModel, tmp_path: Path) -> Path:
    tiny.model.save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    return tmp_path / "dense"


@pytest.fixture
def llama(tiny_llama: HuggingFaceModel, tmp_path: Path) -> Path:
    tiny_llama.model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_the_result_is_that_of_the_model_in_memory(dense: Path, tmp_path: Path):
    settings: dict[str, Any] = SETTINGS | {"evaluation": TOKENS, "bound_rows": 2}
    whole = convexprune.prune(dense, **settings)
    result = convexprune.prune(dense, output_dir=tmp_path / "out", **settings)
    assert result.report.environment["loading"] == "layer by layer"
    expected, found = whole.model.state_dict(), result.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) and expected[n].dtype == found[n].dtype for n in expected)
    assert state(dense).keys() == state(tmp_path / "out").keys()
    assert result.report.perplexity == whole.report.perplexity
    drop = {"seconds": 0.0}
    assert [vars(o) | drop for o in result.report.operators] == [vars(o) | drop for o in whole.report.operators]


if transformers.__version__.startswith("4."):
    WHOLE = ("gemma3", "llava")  # the names around their decoders are others on disk
elif transformers.__version__.startswith("5.0."):
    WHOLE = ("deepseek_v2", "gpt_oss", "mixtral", "qwen3_moe")
else:
    WHOLE = ("deepseek_v2", "mixtral", "qwen3_moe")  # transformers fuses their experts while it loads


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_layer_by_layer(family: str, tmp_path: Path):
    build_family(family).save_pretrained(tmp_path / "dense")
    settings: dict[str, Any] = SETTINGS | {"method": "wanda", "dataset": TOKENS % 128}
    whole = convexprune.prune(tmp_path / "dense", **settings)
    result = convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "out", **settings)
    how = result.report.environment["loading"]
    assert how.startswith("whole: ") if family in WHOLE else how == "layer by layer"
    expected, found = whole.model.state_dict(), result.model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)


def test_the_buffers_and_the_calls_are_those_of_the_model_in_memory(dense: Path):
    whole, streamed = load(dense, device="cpu"), load(dense, device="cpu", stream=True)
    for (name, expected), (other, found) in zip(
        whole.model.named_buffers(), streamed.model.named_buffers(), strict=True
    ):
        assert name == other and torch.equal(expected, found) and expected.dtype == found.dtype
    hidden = whole.first_inputs(TOKENS)
    assert torch.equal(hidden, streamed.first_inputs(TOKENS))
    pairs = zip(whole.layers, streamed.layers, whole.calls(TOKENS), streamed.calls(TOKENS), strict=True)
    with torch.no_grad():
        for ours, theirs, call, same in pairs:
            with streamed.resident(theirs):
                found = same(theirs.module, hidden)
            hidden = call(ours.module, hidden)
            assert torch.equal(hidden, found)
        assert torch.equal(logits_at(whole.model, TOKENS), streamed.logits(TOKENS, hidden))


def test_one_decoder_layer_at_a_time_is_in_memory(llama: Path, tmp_path: Path, monkeypatch):
    opened: list[HuggingFaceModel] = []
    monkeypatch.setattr(convexprune._api.request, "load", lambda *a, **k: opened.append(load(*a, **k)) or opened[-1])
    run_steps, resident = room.run_steps, []

    def look(steps, stacks, began):
        name = stacks[0].context.layer.name
        for layer in opened[0].layers:
            here = {not p.is_meta for p in layer.module.parameters()}
            assert here == {layer.name == name}
            resident.append(name)
        run_steps(steps, stacks, began)

    monkeypatch.setattr(room, "run_steps", look)
    convexprune.prune(llama, output_dir=tmp_path / "out", **SETTINGS)
    assert len(opened) == 1 and len(resident) == 2 * 2 * 4


def test_another_dtype_is_that_of_the_whole_result(llama: Path, tmp_path: Path):
    whole = convexprune.prune(llama, dtype="bfloat16", method="wanda", **SETTINGS)
    convexprune.prune(llama, dtype="bfloat16", method="wanda", output_dir=tmp_path / "out", **SETTINGS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in whole.model.state_dict().items())


def test_a_checkpoint_without_the_prefix_of_the_head_keeps_its_names(llama: Path, tmp_path: Path):
    expected = state(llama)
    (llama / "model.safetensors").unlink()
    bare = {name.removeprefix("model."): t for name, t in expected.items()}
    save_file(bare | {"beside": torch.arange(3)}, llama / "model.safetensors", metadata={"format": "pt"})
    result = convexprune.prune(llama, method="wanda", output_dir=tmp_path / "out", **SETTINGS)
    assert result.report.environment["loading"] == "layer by layer"
    found = state(tmp_path / "out")
    assert found.keys() == bare.keys() | {"beside"} and torch.equal(found["beside"], torch.arange(3))
    assert int((found["layers.0.mlp.up_proj.weight"] == 0).sum()) == 768
    assert torch.equal(found["embed_tokens.weight"], bare["embed_tokens.weight"])


def test_a_checkpoint_that_cannot_be_streamed_is_loaded_whole_and_the_report_says_why(llama: Path, tmp_path: Path):
    torch.save(state(llama), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    streamed = tmp_path / "out"
    result = convexprune.prune(llama, method="wanda", allow_pickle=True, output_dir=streamed, **SETTINGS)
    assert result.report.environment["loading"].startswith("whole: there is no model.safetensors")
    whole = convexprune.prune(llama, method="wanda", allow_pickle=True, **SETTINGS)
    loaded = AutoModelForCausalLM.from_pretrained(streamed)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in whole.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model\.norm\.weight has another shape"),
        (lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(torch.inf), r"layers\.1\.mlp\.up_proj\.weight holds"),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), r"model\.norm\.weight holds 32 of 32"),
    ],
)
def test_a_checkpoint_that_is_not_right_is_refused(llama: Path, tmp_path: Path, change, message: str):
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        convexprune.prune(llama, method="wanda", output_dir=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()  # nothing that a second try would be refused for


def test_a_shard_that_is_missing_is_named(dense: Path, tmp_path: Path):
    path = max(dense.glob("model-*.safetensors"))
    path.unlink()
    with pytest.raises(ModelError, match=path.name):
        convexprune.prune(dense, method="wanda", output_dir=tmp_path / "out", **SETTINGS)


def test_a_name_on_the_hub_is_its_local_snapshot(llama: Path, tmp_path: Path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc"
    shutil.copytree(llama, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    from convexprune.adapters._checkpoints.model_folder import local_folder

    assert local_folder("someone/tiny", "main") == snapshot


def test_a_tuple_that_a_layer_returns_is_handed_on(tiny_llama: HuggingFaceModel, monkeypatch):
    """Some families return the hidden states inside a tuple: what stands in for a layer has to do so too."""
    expected = tiny_llama.calls(TOKENS[:1])
    first, second = (layer.module for layer in tiny_llama.layers)
    own = first.forward
    monkeypatch.setattr(first, "forward", lambda *a, **k: (own(*a, **k), "beside"))
    unwrapped = []

    def unwrap(_, args):
        hidden, beside = args[0]
        unwrapped.append(beside)
        return hidden, *args[1:]

    for module in (second, tiny_llama.model.get_submodule("model.norm")):  # as the families do that return tuples
        module.register_forward_pre_hook(unwrap)
    found = tiny_llama.calls(TOKENS[:1])
    assert unwrapped == ["beside"] * 2 and len(found) == len(expected)
    assert "forward" in vars(first) and "forward" not in vars(second)


def test_what_comes_next_is_read_ahead(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int, int]] = []

    def advise(descriptor: int, begin: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        asked.append((path.parent.name if path.suffix == ".bin" else path.name, begin, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    convexprune.prune(llama, output_dir=tmp_path / "a", **SETTINGS)
    # Each layer: what enters it, four times; what stages 2 and 3 see, of scratch/00000, 00001; what leaves it.
    assert [place for place, *_ in asked].count("hidden") == 2 * 4 + 1
    assert sum(place.startswith("0000") for place, *_ in asked) == 2 * 2 + 1
    stored = entries(llama / "model.safetensors")[0]
    second = {(e.begin, e.spec.nbytes) for name, e in stored.items() if ".layers.1." in name}
    assert {(begin, length) for place, begin, length in asked if place == "model.safetensors"} == second
    monkeypatch.delattr(os, "posix_fadvise")  # as on macOS
    convexprune.prune(llama, output_dir=tmp_path / "b", **SETTINGS)
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")


@pytest.mark.parametrize("stream", [True, False])
def test_a_configuration_of_fewer_layers_than_the_checkpoint_has_is_refused(tmp_path: Path, stream: bool):
    build_family("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config.json counts 1 decoder layers, and there is model\.layers\.1\."):
        load(tmp_path, device="cpu", stream=stream)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert len(load(tmp_path, device="cpu", stream=stream).layers) == 1
