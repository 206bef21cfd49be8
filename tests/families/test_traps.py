"""Traps of transformers that pruners fell into: caches, masks of each layer, tuples, precisions, shards, catchers."""

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, SMALL, TOKENS, build_family
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import convexprune
from convexprune._device.machine import steps
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._checkpoints.admission import refuse_non_finite
from convexprune.adapters._discovery.probing import replay_error
from convexprune.errors import ModelError


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_call_holds_no_cache_that_grows(family: str):
    model = HuggingFaceModel(build_family(family))
    hidden, calls = model.first_inputs(TOKENS), model.calls(TOKENS)
    for layer, call in zip(model.layers, calls, strict=True):
        first = call(layer.module, hidden)
        assert torch.equal(call(layer.module, hidden), first)
        hidden = first


def test_each_layer_keeps_its_own_mask_and_rotary_table():
    sliding, full = HuggingFaceModel(build_family("gemma3_text")).calls(TOKENS)
    masks = [call.kwargs["attention_mask"] for call in (sliding, full)]
    assert masks[0] is not None and (masks[1] is None or not torch.equal(masks[0], masks[1]))


@pytest.mark.parametrize("family", ["falcon", "gemma3_text", "gpt2", "llama", "qwen3"])
def test_a_mask_of_the_size_of_a_batch_is_recorded_for_each_size(family: str):
    model = build_family(family)
    model.set_attn_implementation("eager")  # a mask [batch 1 tokens tokens] where sdpa has none
    call = HuggingFaceModel(model).calls(TOKENS[:3])[0]
    masks = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor) and a.shape[-2:] == (24, 24)]
    assert masks and replay_error(HuggingFaceModel(model), TOKENS[:3]) == 0
    settings = SMALL | {"dataset": TOKENS[:3], "num_calibration_samples": 3}  # batches of two and of one
    report = convexprune.prune(model, method="wanda", **settings).report
    assert all(o.tokens == TOKENS[:3].numel() and o.zeros == o.expected_zeros for o in report.operators)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_a_model_in_the_middle_of_its_training_is_pruned_as_any(family: str):
    model, expected = build_family(family), build_family(family)
    # The layers' forward is wrapped, and computed once more for the gradient.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    for each in (model, expected):
        convexprune.prune(each, method="wanda", **SMALL)
    pruned = dict(expected.named_parameters())
    assert all(torch.equal(p, pruned[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_experts_are_heard_whichever_kernel_multiplies_them(family: str):
    seen = []
    for kernel in ("eager", "batched_mm", "grouped_mm"):
        model = build_family(family)
        choose = getattr(model, "set_experts_implementation", None)  # of transformers 5; before, each is a module
        if choose is not None:
            choose(kernel)
        report = convexprune.prune(model, method="wanda", **SMALL).report
        seen.append({o.name: o.tokens for o in report.operators if "experts" in o.name})
    assert seen[0] and seen[0] == seen[1] == seen[2]


@torch.no_grad()
@pytest.mark.parametrize("family", ["bloom", "falcon", "opt", "gpt2"])
def test_a_layers_output_is_its_hidden_states_whether_it_returns_a_tuple_or_not(family: str):
    model = HuggingFaceModel(build_family(family))
    call, hidden = model.calls(TOKENS)[0], model.first_inputs(TOKENS)
    assert call(model.layers[0].module, hidden).shape == hidden.shape == (*TOKENS.shape, 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "mixtral"])
def test_counts_are_exact_in_the_checkpoints_own_precision(family: str, dtype: str, tmp_path: Path):
    dense = build_family(family).to(getattr(torch, dtype))
    dense.save_pretrained(tmp_path / "dense")
    result = convexprune.prune(tmp_path / "dense", method="wanda", **SMALL, output_dir=tmp_path / "pruned")
    environment = result.report.environment
    assert environment["dtype"] == dtype
    assert environment["steps"] == steps("cpu") in ("bfloat16", "float32")
    loaded = type(dense).from_pretrained(tmp_path / "pruned", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    for layer in HuggingFaceModel(loaded).layers:
        for operator in layer.operators:
            assert int((operator.read() == 0).sum()) == operator.read().numel() // 2


def test_a_sharded_checkpoint_is_read(tmp_path: Path):
    dense = build_family("mixtral")
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    assert convexprune.prune(tmp_path / "dense", method="magnitude", **SMALL).report.sparsity == 0.5


def test_a_module_is_never_put_in_a_layers_place():
    model = build_family("gemma3_text")
    layers = [type(layer) for layer in model.model.layers]
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda *_: seen.append([type(layer) for layer in model.model.layers])
    )
    convexprune.prune(model, method="wanda", **SMALL)
    hook.remove()
    assert seen and all(now == layers for now in seen)


def test_torchs_format_for_2_4_holds_a_pruned_operator_without_loss():
    targets = ["model.decoder.layers.0.fc1"]
    model = convexprune.prune(method="wanda", pattern="2:4", targets=targets, max_seq_length=24, **SMALL).model
    weight = model.get_submodule(targets[0]).get_parameter("weight").detach().half()
    values, places = sparse_semi_structured_from_dense_cutlass(weight)  # what `to_sparse_semi_structured` stores
    assert values.shape == (weight.shape[0], weight.shape[1] // 2)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_whose_sum_overflows_are_finite_all_the_same(dtype: torch.dtype):
    module = nn.Linear(64, 64).to(dtype)
    nn.init.constant_(module.weight, torch.finfo(dtype).max)
    refuse_non_finite(module)
    for broken in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            module.weight[3, 5] = broken
        with pytest.raises(ModelError, match=r"weight holds 1 of 4,096 values"):
            refuse_non_finite(module)
