"""Every family end to end: from a folder to a pruned folder that plain transformers loads, with the exact counts.

What is recorded here becomes docs/models.md (`.ci/matrix`).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, POSITIONS, VOCABULARY, build_family
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Llama4TextConfig

import convexprune
from convexprune.adapters import TESTED, HuggingFaceModel
from convexprune.pipeline.folds import Folds

TOKENS = torch.randint(2, VOCABULARY - 2, (4, 24), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"dataset": TOKENS, "num_calibration_samples": 4, "batch_size": 2}
PATTERNS = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
MOE = ["deepseek_v2", "gpt_oss", "mixtral", "qwen3_moe"]


def own_stages(model: HuggingFaceModel) -> str:
    """The operators of the last layer; of experts, those of the first."""
    stages = []
    for stage in model.layers[-1].stages:
        groups = [[operator.name for operator in group.operators] for group in stage]
        firsts = [names for names in groups if not any(f".{k}" in names[0] for k in "123")]
        stages.append("; ".join(" ".join(names) for names in firsts))
    return " → ".join(stages)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


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
    replay = model.replay_error(TOKENS)
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


# ---- experts


@pytest.mark.parametrize("family", MOE)
def test_routers_are_never_pruned_and_are_listed(family: str):
    model = HuggingFaceModel(build_family(family))
    routing = [name for name, reason in model.left_alone if reason == "routes tokens to experts"]
    assert len(routing) == len(model.layers) - (family == "deepseek_v2")
    for name in routing:
        weight = model.model.get_parameter(name if name.endswith("weight") else f"{name}.weight")
        assert len(weight) == 4


@pytest.mark.parametrize("family", MOE)
def test_each_expert_sees_the_tokens_that_are_routed_to_it(family: str):
    model = build_family(family)
    report = convexprune.prune(model, method="wanda", **SMALL, targets=[r"re:.*\.experts"]).report
    last = [o for o in report.operators if f"layers.{len(model.model.layers) - 1}." in o.name]
    tokens = {}
    for o in last:
        tokens.setdefault(o.inputs, []).append(o.tokens)
    assert len(tokens) == 2
    for seen in tokens.values():  # each token goes to two experts
        assert sum(seen) * 4 // len(seen) == 2 * TOKENS.numel()
        assert len(set(seen)) > 1


def test_a_fused_expert_gets_the_moments_of_its_own_tokens(monkeypatch: pytest.MonkeyPatch):
    from convexprune.pipeline import layer as room

    def keep(layer: str, group: Any, folds: Folds, *_: Any):
        moments.setdefault(group.operators[0].name, folds.total)

    model, moments = build_family("gpt_oss"), {}
    monkeypatch.setattr(room, "_prune_group", keep)
    block = model.model.layers[0].mlp
    given: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
        hook.remove()
        x = given[0].flatten(0, 1)
        chosen = (x @ block.router.weight.T + block.router.bias).topk(2).indices
    convexprune.prune(model, method="wanda", **SMALL, targets=["re:model.layers.0.*experts"], error_correction=0)
    for expert in range(4):
        own = x[(chosen == expert).any(1)]
        found = moments[f"mlp.experts.gate_up_proj.{expert}"]
        borrowed = max(0, 32 - len(own))
        assert found.tokens == len(own) + borrowed
        if not borrowed:
            torch.testing.assert_close(found.gram, own.T @ own / len(own), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_without_a_token_are_named_and_borrow_from_all(family: str):
    config = build_family(family).config
    config.num_local_experts = config.num_experts = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    settings: dict[str, Any] = SMALL | {"dataset": TOKENS[:2, :3], "num_calibration_samples": 2}
    report = convexprune.prune(model, method="wanda", **settings).report  # 6 tokens, two experts each
    starved = [o for o in report.operators if o.tokens == 0]
    assert len({o.name for o in starved}) >= 2 * (16 - 12)
    for o in starved:
        assert o.facts["borrowed_tokens"] == o.inputs
        assert o.zeros == o.expected_zeros
    short = {o.name for o in report.operators if "experts" in o.name and o.tokens < o.inputs}
    assert set(report.short_of_tokens) == short
    assert json.loads(report.to_json())["short_of_tokens"] == report.short_of_tokens


def test_borrowed_moments_are_the_mean_of_all_experts_tokens():
    x = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    starved, shared = Folds(6, torch.device("cpu")), Folds(6, torch.device("cpu"))
    own, others = torch.randn(1, 2, 6), torch.randn(4, 7, 6)
    starved.add(own, None, False)
    shared.add(others, None, False)
    starved.borrow(shared)
    assert (starved.tokens, starved.borrowed, starved.total.tokens) == (2, 4, 6)
    mean = others.flatten(0, 1).T @ others.flatten(0, 1) / 28
    torch.testing.assert_close(starved.total.gram, (own[0].T @ own[0] + 4 * mean) / 6)
    rich = Folds(4, torch.device("cpu"))
    rich.add(x, None, False)
    rich.borrow(rich)
    assert rich.borrowed == 0 and rich.total.tokens == 35


def test_experts_are_pruned_alike_however_many_have_room(monkeypatch: pytest.MonkeyPatch):
    from convexprune.pipeline import folds as room

    results = []
    for bytes_ in (4 << 30, 1):
        monkeypatch.setattr(room, "ROOM", bytes_)
        model = build_family("mixtral")
        convexprune.prune(model, method="sparsegpt", **SMALL)
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_experts_on_disk_are_as_the_checkpoint_had_them(tmp_path: Path):
    for family, names in {
        "mixtral": ["model.layers.0.block_sparse_moe.experts.3.w1.weight"],
        "qwen3_moe": ["model.layers.0.mlp.experts.3.up_proj.weight"],
        "gpt_oss": ["model.layers.0.mlp.experts.gate_up_proj"],
    }.items():
        convexprune.prune(build_family(family), method="magnitude", **SMALL, output_dir=tmp_path / family)
        assert set(names) <= on_disk(tmp_path / family).keys()


def test_experts_that_are_multiplied_all_at_once_are_left_alone_with_their_router():
    common: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "head_dim": 8,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = Llama4TextConfig(**common, **heads, intermediate_size_mlp=24, num_local_experts=4, pad_token_id=None)
    model = HuggingFaceModel(AutoModelForCausalLM.from_config(config))
    alone = {n.removeprefix("model.layers.1.feed_forward."): r for n, r in model.left_alone if "layers.1" in n}
    assert alone.pop("router") == "routes tokens to experts"
    assert alone == dict.fromkeys(
        ("experts.gate_up_proj", "experts.down_proj"), "in a Llama4TextExperts, no known linear map"
    )
    assert [o.name for o in model.layers[1].operators][-1] == "feed_forward.shared_expert.down_proj"


def test_a_model_that_was_pruned_in_place_runs_its_experts_as_before():
    model = build_family("mixtral")
    own = getattr(model.config, "_experts_implementation", None)
    convexprune.prune(model, method="wanda", **SMALL)
    assert getattr(model.config, "_experts_implementation", None) == own
    assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
