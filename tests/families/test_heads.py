"""Attention heads removed for good, a KV group at a time: see `test_channels` for what holds of both kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from test_channels import HEADS, require_same_as_zeros
from tiny_families import DEEPSEEK, FAMILIES, GROUPED, TOKENS, build_family
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.llama import modeling_llama

import convexprune
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._removal.heads import find_heads
from convexprune.constraints import Heads
from convexprune.errors import ConvexpruneError, ModelError, PatternError

WIDTHS = {  # heads and KV heads before and after; of most families 4 and 2, of which one is left
    "deepseek_v2": {"num_attention_heads": [4, 2], "num_key_value_heads": [4, 2]},
    "llama, 1": {"num_attention_heads": [4, 2], "num_key_value_heads": [4, 2]},
    **{
        name: {"text_config.num_attention_heads": [4, 2], "text_config.num_key_value_heads": [2, 1]}
        for name in ("gemma3", "llava")
    },
}
NOT_SAID = "cannot say that {} KV groups of heads are left, each as wide as before. It can say no other number. "
REFUSED = {
    "bloom": NOT_SAID.format("2 of the 4"),
    "falcon": "All query heads share one KV head",
    "falcon, new": NOT_SAID.format("1 of the 2"),
    "gpt2": NOT_SAID.format("2 of the 4") + "Pattern 'channels' makes the MLP narrower, and 'columns:8' with "
    "targets=['attn.c_proj'] (--targets) zeroes heads in place.",
    "gpt_neox": NOT_SAID.format("2 of the 4"), "gpt_neox, sequential": NOT_SAID.format("2 of the 4"),
    "olmo2": "q_proj: some of its 32 rows change no KV group of heads, or several, as where a norm is over all of them",
    "opt": NOT_SAID.format("2 of the 4"), "opt, 350M": NOT_SAID.format("2 of the 4"),
    "stablelm": NOT_SAID.format("1 of the 2"),
}  # fmt: skip
PATTERN = Heads(0.5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_without_heads_computes_what_it_does_with_zeros(family: str):
    model = HuggingFaceModel(build_family(family))
    if family in REFUSED:
        with pytest.raises(ConvexpruneError) as refused:
            find_heads(model, PATTERN)
        assert REFUSED[family] in str(refused.value)
        return
    found = find_heads(model, PATTERN)
    found.choose(model)
    operators = [operator for layer in model.layers for operator in layer.operators]
    assert len(operators) == len(found.sets) == len(model.layers)
    assert {pattern.block for pattern in found.patterns.values()} == {operators[0].shape[1] // found.sets[0].size}
    narrowed = require_same_as_zeros(model, found, PATTERN)
    usual = {"num_attention_heads": [4, 2], "num_key_value_heads": [2, 1]}
    assert narrowed.note()["widths"] == WIDTHS.get(family, usual)


@pytest.mark.parametrize("family", ["llama, 3.2", "qwen2", "phi3"])
def test_the_result_is_an_ordinary_smaller_folder(family: str, tmp_path: Path):
    """Tied embeddings, biases, and q, k and v in one."""
    build_family(family).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    result = convexprune.prune(tmp_path / "dense", **HEADS, output_dir=tmp_path / "out")
    assert result.report.environment["loading"] == "layer by layer"
    dense, smaller = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "out"))
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads, smaller.config.head_dim) == (
        2,
        1,
        8,
    )
    assert torch.equal(result.model(TOKENS).logits, smaller(TOKENS).logits)
    note = json.loads((tmp_path / "out" / "heads.json").read_text())
    operators = {o.name: o for o in result.report.operators}
    assert note["removed"].keys() == operators.keys() and len(operators) == 2
    for name, (gone,) in note["removed"].items():
        kept = slice(0, 16) if gone else slice(16, 32)
        assert operators[name].pattern == "columns:16 50%" and operators[name].zeros == 32 * 16
        gap = operators[name].gap
        assert gap is not None and gap < 1e-4
        if family == "qwen2":  # what makes the heads that are left is as before
            for kind in "weight", "bias":
                before, after = (
                    m.get_parameter(f"{name.replace('o_proj', 'q_proj')}.{kind}") for m in (dense, smaller)
                )
                assert torch.equal(after, before[kept])
        with torch.no_grad():  # the dense model with the operator's new weights and zeros computes the same
            dense.get_parameter(f"{name}.weight").zero_()[:, kept] = smaller.get_parameter(f"{name}.weight")
    torch.testing.assert_close(smaller(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)
    counts = result.report.narrowed
    assert counts is not None and counts["parameters"][1] == sum(p.numel() for p in smaller.parameters())
    assert result.report.sparsity == pytest.approx(0.5) and "heads.json" in result.report.files
    assert "removed attention heads: a smaller dense model" in (tmp_path / "out" / "README.md").read_text()


def llama(heads: int, groups: int) -> HuggingFaceModel:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=groups, initializer_range=0.2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.config._attn_implementation = "eager"
    return HuggingFaceModel(model)


def test_a_number_that_cannot_be_had_is_refused_with_one_that_can():
    model = llama(8, 8)
    try:
        LlamaConfig(hidden_size=32, num_attention_heads=3, num_key_value_heads=3, head_dim=4)
    except StrictDataclassError:  # it wants a number of heads that divides the hidden size, or fewer
        with pytest.raises(ModelError, match=r"that 3 of the 8 KV groups .* It can say 4, with sparsity=0\.5"):
            find_heads(model, Heads(0.625))
    else:  # an older release
        assert find_heads(model, Heads(0.625)).widths["num_attention_heads"] == (8, 3)
    for share, rounded in ((0.01, 0), (0.99, 8)):
        with pytest.raises(
            PatternError, match=rf"of 8 KV groups of heads rounds to {rounded}. Accepted: 0\.125 for one"
        ):
            find_heads(model, Heads(share))


def test_heads_that_are_not_side_by_side_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Query heads 0 and 2 attend to the first KV head, 1 and 3 to the second."""
    monkeypatch.setattr(modeling_llama, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1))
    model = llama(4, 2)
    with pytest.raises(ModelError, match="change no KV group of heads, or several"):
        find_heads(model, PATTERN)


def latent() -> PreTrainedModel:
    """Keys [8] and values [12] of each head side by side, as in MLA, where each query head has its own."""
    sizes: dict[str, Any] = DEEPSEEK | {"num_key_value_heads": 4, "v_head_dim": 12, "num_hidden_layers": 2}
    sizes |= {"n_group": 1, "topk_group": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))


def gated() -> PreTrainedModel:
    """A gate beside the queries of each head, and a layer whose linear attention has as many heads."""
    sizes: dict[str, Any] = GROUPED | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    sizes |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    sizes |= {"linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, shared_expert_intermediate_size=16))


@torch.no_grad()
@pytest.mark.parametrize(("build", "layers"), [(latent, 2), (gated, 1)])
def test_operators_that_make_more_than_values_lose_all_of_a_head(build: Callable[[], PreTrainedModel], layers: int):
    torch.manual_seed(0)
    model = HuggingFaceModel(build().eval())
    found = find_heads(model, PATTERN)
    found.choose(model)
    assert len(found.sets) == layers
    require_same_as_zeros(model, found, PATTERN)


def test_a_number_that_says_more_than_the_heads_is_refused_with_what_it_says():
    """The heads of the linear attention, which are as many, stay."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    kinds: dict[str, Any] = {"num_local_experts": 2, "layer_types": ["full_attention", "linear_attention"]}
    config = MiniMaxConfig(**sizes, **kinds, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    with pytest.raises(ModelError, match="cannot say that 1 of the 2 KV groups of heads are left"):
        find_heads(HuggingFaceModel(MiniMaxForCausalLM(config)), PATTERN)


def test_heads_that_depend_on_their_number_are_refused(monkeypatch: pytest.MonkeyPatch):
    """As those of ALiBi do: with its slopes a head that is left would compute something else in the smaller model."""
    eager, slopes = modeling_llama.eager_attention_forward, torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]

    def forward(*args: Any, **kwargs: Any) -> Any:
        output, weights = eager(*args, **kwargs)
        return output * slopes, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", forward)
    model = llama(4, 2)
    with pytest.raises(ModelError, match="heads depend on their number"):
        find_heads(model, PATTERN)


def test_heads_that_depend_on_how_many_there_are_are_refused(monkeypatch: pytest.MonkeyPatch):
    """The shapes are right, but the scores are divided by something else."""
    begin = modeling_llama.LlamaAttention.__init__

    def changed(self: Any, config: LlamaConfig, layer_idx: int) -> None:
        begin(self, config, layer_idx)
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", changed)
    with pytest.raises(ModelError, match=r"layers\.0 of a model with fewer heads computes something else"):
        find_heads(llama(4, 2), PATTERN)


def test_what_does_not_fit_is_refused_before_any_work(build: Callable[[str], PreTrainedModel], tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "dense")

    def refused(error: type[Exception], match: str, **given: Any) -> None:
        with pytest.raises(error, match=match):
            convexprune.prune(tmp_path / "dense", **HEADS | given, output_dir=tmp_path / "out")

    refused(PatternError, "Leave quota out", quota="row")
    refused(PatternError, "SparseGPT decides about columns one after another", method="sparsegpt")
    refused(ConvexpruneError, "prune twice, the smaller model last", quantize="int4")
    assert not (tmp_path / "out").exists()
