"""A quantized model in the layout of compressed-tensors: read by the library itself, with the same bits."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import SETTINGS, TOKENS
from safetensors.torch import load_file
from tiny_families import FAMILIES, GROUPED, build_family
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Llama4ForCausalLM, Llama4TextConfig
from typer.testing import CliRunner

import convexprune
from convexprune._api import calls
from convexprune._cli import app
from convexprune._container.compressed_tensors import packed_codes
from convexprune._rendering.card import card
from convexprune.errors import ModelError, OutputError

GRID: dict[str, Any] = {"quantize": "int4", "group_size": 32, "ignore": ["down_proj"]}


@pytest.fixture(params=["llama-bf16", "llama"])
def run(request: pytest.FixtureRequest, build, tmp_path: Path) -> Path:
    build(request.param).save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    convexprune.prune(tmp_path / "dense", sparsity=0.25, output_dir=tmp_path / "run", **SETTINGS | GRID)
    return tmp_path / "run"


@given(st.integers(3, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 99))
def test_codes_are_packed_as_the_library_does(bits: int, rows: int, columns: int, seed: int):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (rows, columns), generator=generator).to(torch.int8)
    assert torch.equal(packed_codes(codes, bits), pack_to_int32(codes, bits))


def test_transformers_loads_the_weights_of_the_run(run: Path, tmp_path: Path):
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    nbytes = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert f"weights: {nbytes:,} bytes, " in result.stdout and "bits a weight of all" in result.stdout
    ours = AutoModelForCausalLM.from_pretrained(run)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=ours.dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and "lm_head" in config["ignore"]
    assert "model.layers.0.mlp.down_proj" in config["ignore"]
    tokens = torch.arange(1, 30)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    stored = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert "model.layers.0.self_attn.q_proj.weight_packed" in stored
    assert "model.layers.0.self_attn.q_proj.weight" not in stored
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("sparsity", [0, 0.25])
def test_the_card_is_that_of_the_export(build, tmp_path: Path, sparsity: float):
    build("llama").save_pretrained(tmp_path / "dense")
    grid: dict[str, Any] = GRID | {"sparsity": sparsity}
    report = convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "run", **SETTINGS | grid).report
    convexprune.export(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert {"- int4", "- compressed-tensors"} <= set(front.splitlines())
    assert ("- unstructured" in front.splitlines()) == ("- sparse" in front.splitlines()) == bool(sparsity)
    assert body.strip().splitlines()[0].endswith(", int4, compressed-tensors")
    assert "quantized to int4, and stored as codes and scales in the layout compressed-tensors" in body
    assert "put into the pattern" not in body and "their products" not in body and "\nvllm serve DIR\n" in body
    again = card(replace(report, recipe=report.recipe | {"dataset": "text.txt"}), "compressed-tensors")
    assert "--output RUN\nconvexprune export RUN DIR\n" in again
    names = set(re.findall(r"[\w.-]+\.(?:json|html|yaml|md|safetensors)\b", body))
    assert names == {"recipe.yaml"} <= {path.name for path in (tmp_path / "out").iterdir()}
    plain = (tmp_path / "run" / "README.md").read_text()
    assert "quantized to int4." in plain and "vllm" not in plain and "put into the pattern" not in plain


def test_an_export_without_its_card_is_not_there(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        assert not (tmp_path / "out").exists()
        raise OutputError("The disk is full.")

    build("llama").save_pretrained(tmp_path / "dense")
    grid = GRID | {"sparsity": 0, "quantizer": "rtn"}
    convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "run", **SETTINGS | grid)
    monkeypatch.setattr(calls, "write_card", fail)
    with pytest.raises(OutputError, match="full"):
        convexprune.export(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "run"}


@pytest.mark.parametrize("family", ["mixtral", "gemma3"])
def test_experts_and_decoders_beside_a_vision_tower_are_loaded(family: str, tmp_path: Path):
    """The experts are fused when they are loaded, and the names of the tower are others on disk."""
    build_family(family).save_pretrained(tmp_path / "dense")
    grid: dict[str, Any] = {"sparsity": 0, "quantize": "int4", "group_size": -1, "dataset": TOKENS % 100 + 2}
    convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "run", **SETTINGS | grid)
    convexprune.export(tmp_path / "run", tmp_path / "out")
    kind = AutoModelForCausalLM if family == "mixtral" else AutoModelForImageTextToText
    ours, theirs = (kind.from_pretrained(tmp_path / each, dtype=torch.float32) for each in ("run", "out"))
    tokens = torch.arange(2, 30)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("family", ["llama4", "gpt_oss"])
def test_experts_in_one_tensor_are_refused(family: str, tmp_path: Path):
    sizes: dict[str, Any] = GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    model = build_family(family) if family in FAMILIES else Llama4ForCausalLM(Llama4TextConfig(**sizes, head_dim=8))
    model.save_pretrained(tmp_path / "dense")
    grid: dict[str, Any] = {"sparsity": 0, "quantize": "int4", "group_size": -1, "dataset": TOKENS % 100 + 2}
    convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "run", **SETTINGS | grid)
    with pytest.raises(ModelError, match="takes Linear modules only, no experts in one tensor"):
        convexprune.export(tmp_path / "run", tmp_path / "out")


def test_one_scale_for_a_row_is_their_strategy_channel(build, tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "dense")
    grid: dict[str, Any] = {"sparsity": 0, "quantize": "int8", "group_size": -1}
    convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "run", **SETTINGS | grid)
    convexprune.export(tmp_path / "run", tmp_path / "out")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("run", "out"))
    tokens = torch.arange(1, 30)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_what_is_not_quantized_is_refused(build, tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "dense")
    convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "run", **SETTINGS)
    convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "coded", sparsity=0, bits=4, **SETTINGS)
    reasons = {
        "dense": "is no result of a run",
        "run": "is not quantized. Prune with --quantize int4",
        "coded": "bits a weight, which the layout pack-quantized cannot say",
    }
    for folder, words in reasons.items():
        with pytest.raises(ModelError, match=words):
            convexprune.export(tmp_path / folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["llama-bf16"], indirect=True)
def test_a_quantized_run_is_verified(run: Path):
    found = convexprune.verify(run, dataset=SETTINGS["dataset"])
    assert found.comparisons and found.errors and not found.miscounted and not found.faults


def test_what_is_on_the_grid_already_is_not_taken_for_the_runs(run: Path, tmp_path: Path):
    """A second run quantizes what the first one left: more weights are on the grid than it has operators."""
    own: dict[str, Any] = SETTINGS | GRID | {"sparsity": 0, "targets": ["o_proj"], "ignore": []}
    convexprune.prune(run, output_dir=tmp_path / "again", **own)
    with pytest.raises(ModelError, match=r"has quantized 2,048 weights, and matrices .* with 12,288 are on int4"):
        convexprune.export(tmp_path / "again", tmp_path / "out")
