"""A folder for vLLM of a size: int8 and int4 by forecast loss, in as many bytes or few less, read by transformers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_gguf import RUN, built, quantized
from transformers import AutoModelForCausalLM

import convexprune
from convexprune._container.layouts import stored_names
from convexprune.errors import PatternError, RecipeError

MIXED: dict[str, Any] = {"quantize": "compressed-tensors", "sparsity": None}


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3moe"])
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


def test_a_folder_that_cannot_be_had_is_refused_before_any_work(tmp_path: Path):
    source = built("llama", tmp_path / "dense", torch.bfloat16)
    both = {"target": "1MB", "bits": 4}
    for settings, told in (({"target": "1KB"}, "Accepted: "), ({}, "give target"), (both, "one of them")):
        with pytest.raises((PatternError, RecipeError), match=told):
            convexprune.prune(source, output_dir=tmp_path / "none", **RUN | MIXED | settings)
    assert not (tmp_path / "none").exists()
