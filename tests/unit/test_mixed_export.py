"""A folder for vLLM of a size: int8 and int4 by forecast loss, in as many bytes or few less, read by transformers."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from test_gguf import RUN, built, exported, quantized
from tiny_families import build_family
from transformers import AutoModelForCausalLM

import convexprune
from convexprune._api.calls import plan
from convexprune._api.given import run_warnings
from convexprune._container.layouts import stored_names
from convexprune.adapters import load
from convexprune.constraints import Grid
from convexprune.errors import ModelError, PatternError, RecipeError
from convexprune.recipe import make_recipe
from convexprune.validation import advise

MIXED: dict[str, Any] = {"quantize": "compressed-tensors", "sparsity": None}


@pytest.mark.parametrize("family", [pytest.param("qwen2", marks=pytest.mark.long), "llama", "qwen3moe"])
def test_a_folder_has_the_bytes_that_were_asked_for_or_few_less(family: str, tmp_path: Path):
    source = built(family, tmp_path / "dense", torch.bfloat16)
    sizes = {name: tensor.numel() for name, tensor in load_file(source / "model.safetensors").items()}
    target = 2 * sizes.pop("model.embed_tokens.weight") + 6 * sum(sizes.values()) // 8  # of all else 6 bits a weight
    run = quantized(source, tmp_path / "run", target=target, **MIXED)
    out = convexprune.export(run, tmp_path / "out")
    record: Any = convexprune.Report.from_json((run / "report.json").read_text()).sized
    assert (out / "model.safetensors").stat().st_size == record["bytes"] <= record["target"]
    assert record["target"] < (1.1 if family == "qwen3moe" else 1.02) * record["bytes"]  # experts have a single type
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}, config
    targets = [name for group in groups for name in group["targets"]]
    assert len(targets) == len(set(targets)) and ("lm_head" in targets) == (family != "llama")
    assert "model.embed_tokens" in config["ignore"] and not set(targets) & set(config["ignore"])
    types = {own: kind for names, (kind, _) in record["tensors"].items() for own in names.split(", ")}
    experts = [re.compile(own.removeprefix("re:")) for own in targets if own.startswith("re:")]
    assert len(experts) == (family == "qwen3moe")
    for name in (stored for own in types for stored in stored_names(own)):
        assert name in targets or any(each.fullmatch(name) for each in experts)
    assert len({types[f"model.layers.0.self_attn.{kind}_proj"] for kind in "qkv"}) == 1
    ours = AutoModelForCausalLM.from_pretrained(run, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    tokens = torch.arange(1, 30)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_modules_that_no_file_takes_are_refused_before_any_work(tmp_path: Path):
    build_family("gpt2").save_pretrained(tmp_path / "gpt2")
    asked: dict[str, Any] = RUN | MIXED | {"bits": 16}
    with pytest.raises(ModelError, match="is no Linear module"):
        plan(model=tmp_path / "gpt2", output_dir=tmp_path / "none", **asked)
    assert any("is no Linear module" in note for note in advise(tmp_path / "gpt2", bits=4).notes)


@pytest.mark.parametrize(
    ("family", "grid", "said"),
    [
        ("gpt2", "int4", "c_attn is no Linear module"),
        ("opt", "q8_0", "OPTForCausalLM cannot be written as GGUF"),
        ("opt", "int4", None),
        ("llama", "q8_0", None),
        ("gpt2", None, None),
    ],
)
def test_a_run_whose_codes_export_will_refuse_says_so_as_it_begins(family: str, grid: str | None, said: str | None):
    model = load(build_family(family), device="cpu")
    windows, recipe = {"calibration": torch.ones(64, 64)}, make_recipe(sparsity=0, quantize=grid)
    told = [
        warning for warning in run_warnings(model, windows, recipe) if "`convexprune export` will refuse" in warning
    ]
    assert len(told) == (said is not None) and (said or "") in "".join(told)


def test_a_run_says_that_it_cannot_ask_export_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "convexprune._container.gguf_file", None)
    model, windows = load(build_family("llama"), device="cpu"), {"calibration": torch.ones(64, 64)}
    told = " ".join(run_warnings(model, windows, make_recipe(sparsity=0, quantize="q8_0")))
    assert "not known yet" in told and "pip install" in told


def test_a_folder_that_cannot_be_had_is_refused_before_any_work(tmp_path: Path):
    source = built("llama", tmp_path / "dense", torch.bfloat16)
    both = {"target": "1MB", "bits": 4}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"target": "1KB"}, "Accepted: "),
        ({}, "give target"),
        (both, "one of them"),
    ]
    for settings, told in wrong:
        with pytest.raises((PatternError, RecipeError), match=told):
            convexprune.prune(source, output_dir=tmp_path / "none", **RUN | MIXED | settings)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", [pytest.param("qwen2", marks=pytest.mark.long), "llama"])
def test_embedding_and_head_are_on_a_grid_too(family: str, tmp_path: Path):
    source = built(family, tmp_path / "dense", torch.bfloat16)
    plain = convexprune.pack(quantized(source, tmp_path / "plain", quantize="int4"), tmp_path / "plain.pack")
    run = quantized(source, tmp_path / "run", quantize="int4", embedding="int8")
    for grid in (None, "q5_0"):  # the embedding alone has groups
        asked: dict[str, Any] = {"quantize": grid, "embedding": "int8", "group_size": -1, "sparsity": 0.5}
        plan(model=source, output_dir=tmp_path / "none", **RUN | asked)
    stored = load_file(run / "model.safetensors")
    ends = ["model.embed_tokens", "lm_head"][: 2 if family == "qwen2" else 1]
    assert [*convexprune.Report.from_json((run / "report.json").read_text()).ends] == ends
    assert all(Grid(8).violation(stored[f"{name}.weight"]) == 0 for name in ends)
    verified = convexprune.verify(run, dataset=RUN["dataset"], sample=1)
    assert not verified.altered and verified.note.endswith(f"as they are on grids: {', '.join(ends)}.")
    assert convexprune.pack(run, tmp_path / "pack").bits < 0.85 * plain.bits
    out = convexprune.export(run, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == len(ends) and "model.embed_tokens" in config["ignore"]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.bfloat16) for each in (run, out))
    tokens = torch.arange(1, 30)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(exported(run, tmp_path / "model.gguf")).tensors}
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.ffn_down.weight"] == "Q4_0"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"target": "2MB", "sparsity": None, "embedding": "int8"}, "chooses by a size. Leave embedding out"),
        ({"embedding": "q9"}, "grid"),
    ]
    for settings, told in wrong:
        with pytest.raises((PatternError, RecipeError), match=told):
            convexprune.prune(source, output_dir=tmp_path / "none", **RUN | settings)
