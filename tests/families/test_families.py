"""Every family end to end: from a folder to a pruned folder that plain transformers loads, with the exact counts.

What is recorded here becomes lab/families.md (`.ci/matrix`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_families import FAMILIES, POSITIONS, SMALL, TOKENS, VOCABULARY, build_family, on_disk, weights
from torch import nn

import convexprune
from convexprune.adapters import TESTED, HuggingFaceModel
from convexprune.adapters._discovery.family import decoder_layers
from convexprune.adapters._discovery.passes import logits_in_pieces
from convexprune.adapters._discovery.probing import replay_error

PATTERNS = {"50 %": {"sparsity": 0.5, "allocation": "rows"}, "2:4": {"pattern": "2:4"}}


def own_stages(model: HuggingFaceModel) -> str:
    """The operators of the last layer; of experts, those of the first."""
    stages = []
    for stage in model.layers[-1].stages:
        groups = [[operator.name for operator in group.operators] for group in stage]
        firsts = [names for names in groups if not any(f".{k}" in names[0] for k in "123")]
        stages.append("; ".join(" ".join(names) for names in firsts))
    return " → ".join(stages)


def form(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in on_disk(folder).items()}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned_saved_and_loaded(family: str, pattern: str, tmp_path: Path, record_property: Any):
    dense = build_family(family)
    dense.save_pretrained(tmp_path / "dense")
    result = convexprune.prune(
        tmp_path / "dense", method="wanda", **PATTERNS[pattern], **SMALL, output_dir=tmp_path / "pruned"
    )
    assert type(result.model) is type(dense)
    loaded, info = type(dense).from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = HuggingFaceModel(loaded)
    replay = replay_error(model, TOKENS)
    assert replay == 0
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, result.model(TOKENS).logits)
    assert form(tmp_path / "pruned") == form(tmp_path / "dense")

    operators = {f"{layer.name}.{o.name}": o for layer in model.layers for o in layer.operators}
    assert operators.keys() == {o.name for o in result.report.operators}
    for o in result.report.operators:
        weight = operators[o.name].read()
        assert list(weight.shape) == [o.outputs, o.inputs]
        assert int((weight == 0).sum()) == o.zeros == o.expected_zeros == weight.numel() // 2
        if pattern == "2:4":
            assert ((weight.reshape(len(weight), -1, 4) != 0).sum(-1) == 2).all()
    pruned = {o.module.get_parameter(o.place.parameter) for o in operators.values()}  # pyright: ignore[reportAttributeAccessIssue]
    own, now = weights(dense), weights(loaded)
    untouched = {name for name, p in loaded.named_parameters() if p not in pruned}
    assert all(torch.equal(own[name], now[name]) for name in untouched)
    record_property("transformers", transformers.__version__)
    record_property("family", family)
    record_property("pattern", pattern)
    record_property("operators", len(operators))
    record_property("zeros", sum(o.zeros for o in result.report.operators))
    record_property("weights", sum(o.outputs * o.inputs for o in result.report.operators))
    record_property("replay error", replay)
    record_property("stages", own_stages(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_zero_changes_no_bit_of_a_family(family: str):
    model = build_family(family)
    before = weights(model)
    report = convexprune.prune(model, method="magnitude", sparsity=0.0, **SMALL).report
    assert report.operators and all(o.relative_error == 0 for o in report.operators)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_zero_changes_no_bit_on_disk(family: str, tmp_path: Path):
    build_family(family).save_pretrained(tmp_path / "dense")
    settings = SMALL | {"method": "magnitude", "sparsity": 0.0}
    convexprune.prune(tmp_path / "dense", **settings, output_dir=tmp_path / "same")
    dense, same = on_disk(tmp_path / "dense"), on_disk(tmp_path / "same")
    assert dense.keys() == same.keys()
    assert all(torch.equal(dense[name], same[name]) for name in dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_a_family_are_the_same_in_pieces(family: str, monkeypatch: pytest.MonkeyPatch):
    model, runs = build_family(family), list[int]()
    with torch.no_grad():
        whole = model(TOKENS).logits[:, :-1]
        monkeypatch.setattr("convexprune.adapters._discovery.passes.POSITIONS", 7)
        with decoder_layers(model)[1][0].register_forward_hook(lambda *_: runs.append(1)):
            pieces = list(logits_in_pieces(model, TOKENS))
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert len(runs) == 1


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v2"])
def test_the_convex_pruner_beats_wanda_on_a_family(family: str):
    errors = {}
    for method in ("convex", "wanda"):
        report = convexprune.prune(build_family(family), method=method, **SMALL).report
        errors[method] = sum(o.relative_error for o in report.operators)
    assert errors["convex"] < errors["wanda"]


def test_the_families_that_are_listed_are_those_that_are_tested():
    assert {name.partition(",")[0] for name in FAMILIES} == set(TESTED)
    for name in FAMILIES:
        assert build_family(name).config.model_type == name.partition(",")[0]


# ---- what is found by watching


def linear_names(model: HuggingFaceModel) -> list[list[list[str]]]:
    return [[[o.name for o in group.operators] for group in stage] for stage in model.layers[-1].stages]


LLAMA = [
    [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]],
    [["self_attn.o_proj"]],
    [["mlp.gate_proj", "mlp.up_proj"]],
    [["mlp.down_proj"]],
]
OPT = [[["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]], [["self_attn.out_proj"]], [["fc1"]], [["fc2"]]]
NEOX = ["attention.query_key_value", "mlp.dense_h_to_4h", "attention.dense", "mlp.dense_4h_to_h"]
STAGES = {
    **{family: LLAMA for family in ["gemma2", "gemma3", "gemma3_text", "llama", "llama, 1", "llama, 3.2", "llava"]},
    **{family: LLAMA for family in ["mistral", "olmo2", "qwen2", "qwen3", "smollm3", "stablelm"]},
    "opt": OPT,
    "opt, 350M": OPT,
    "phi3": [[["self_attn.qkv_proj"]], [["self_attn.o_proj"]], [["mlp.gate_up_proj"]], [["mlp.down_proj"]]],
    "gpt2": [[["attn.c_attn"]], [["attn.c_proj"]], [["mlp.c_fc"]], [["mlp.c_proj"]]],
    "gpt_neox": [[[NEOX[0]], [NEOX[1]]], [[NEOX[2]], [NEOX[3]]]],  # two branches, each with its own norm
    "gpt_neox, sequential": [[[NEOX[0]]], [[NEOX[2]]], [[NEOX[1]]], [[NEOX[3]]]],
    # Falcon-7B's branches read the same norm's output
    "falcon": [[["self_attention.query_key_value", NEOX[1]]], [["self_attention.dense"], [NEOX[3]]]],
    "falcon, new": [[["self_attention.query_key_value"], [NEOX[1]]], [["self_attention.dense"], [NEOX[3]]]],
    "bloom": [[["self_attention.query_key_value"]], [["self_attention.dense"]], [[NEOX[1]]], [[NEOX[3]]]],
}


@pytest.mark.parametrize("family", STAGES)
def test_operators_that_share_an_input_are_found_in_the_order_of_execution(family: str):
    assert linear_names(HuggingFaceModel(build_family(family))) == STAGES[family]


def test_latent_attention_is_found():
    first, second, third, *_ = linear_names(HuggingFaceModel(build_family("deepseek_v2")))
    assert first == [["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"]]
    assert second == [["self_attn.q_b_proj"], ["self_attn.kv_b_proj"]]
    assert third == [["self_attn.o_proj"]]


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_what_is_around_a_text_decoder_is_left_alone_and_listed(family: str):
    model = HuggingFaceModel(build_family(family))
    assert {layer.name for layer in model.layers} == {f"model.language_model.layers.{i}" for i in range(2)}
    alone = dict(model.left_alone)
    assert any("vision" in name for name in alone)
    linears = {name for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    operators = {f"{layer.name}.{o.name}" for layer in model.layers for o in layer.operators}
    assert linears == operators | alone.keys()


def test_gpt2s_transposed_weights_are_pruned_along_the_inputs():
    model = build_family("gpt2")
    convexprune.prune(model, method="wanda", pattern="2:4", ignore=["c_attn"], **SMALL)
    stored = model.transformer.h[0].mlp.c_fc.weight  # [inputs outputs]
    assert ((stored.T.reshape(-1, 4) != 0).sum(-1) == 2).all()
    assert not ((stored.reshape(-1, 4) != 0).sum(-1) == 2).all()


@pytest.mark.parametrize(("family", "limit"), [("bloom", 2**31), ("gpt2", POSITIONS), ("gemma3", POSITIONS)])
def test_a_model_says_how_far_it_sees(family: str, limit: int):
    model = HuggingFaceModel(build_family(family))
    assert model.max_positions == limit
    assert model.vocab_size == VOCABULARY
