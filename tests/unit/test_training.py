"""Zeros of a pruned model stay zero in training: real steps of real optimizers, the Trainer, and adapters of peft."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from door import SMALL, TOKENS
from peft import LoraConfig, get_peft_model
from tiny_families import SMALL as SMALL_FAMILY
from tiny_families import build_family
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import convexprune
from convexprune import errors

PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # it asks transformers for this
Build = Callable[[str], PreTrainedModel]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.fixture
def pruned(build: Build) -> PreTrainedModel:
    return convexprune.prune(build("llama"), method="magnitude", **SMALL).model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if name.endswith("_proj.weight")}


def count(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def steps(model: Any, optimizer: torch.optim.Optimizer, number: int = 3) -> None:
    model.train()
    for _ in range(number):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zero_and_the_rest_learns(pruned: Any, name: str, dtype: torch.dtype):
    pruned.to(dtype)
    before, dense = zeros(pruned), deepcopy(pruned.state_dict())
    with convexprune.keep_zeros(pruned) as kept:
        steps(pruned, OPTIMIZERS[name](pruned.parameters()))
    after = zeros(pruned)
    assert sum(kept.values()) == count(before) > 0 and set(kept) == set(before)
    assert all(torch.equal(after[each], before[each]) for each in before)
    changed = {key for key, tensor in pruned.state_dict().items() if not torch.equal(tensor, dense[key])}
    assert changed >= {"model.embed_tokens.weight", "model.norm.weight", *before}


def test_without_it_they_are_lost(pruned: Any):
    before = count(zeros(pruned))
    steps(pruned, OPTIMIZERS["AdamW"](pruned.parameters()))
    assert count(zeros(pruned)) < before / 100


def test_what_an_optimizer_has_in_its_memory_moves_no_zero(pruned: Any):
    learnt = deepcopy(pruned)
    optimizer = OPTIMIZERS["SGD"](learnt.parameters())
    steps(learnt, optimizer)  # momentum of weights that are about to be zero
    learnt.load_state_dict(pruned.state_dict())
    before = zeros(learnt)
    with convexprune.keep_zeros(learnt):
        steps(learnt, optimizer)
        assert all(torch.equal(now, before[name]) for name, now in zeros(learnt).items())  # after each step


def test_no_gradient_of_a_zero_counts(pruned: Any):
    with convexprune.keep_zeros(pruned):
        pruned(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, mask in zeros(pruned).items():
        gradient = pruned.get_parameter(name).grad
        assert not gradient[mask].any() and gradient[~mask].any()


def test_it_ends_with_its_block_also_if_that_fails(pruned: Any):
    before = count(zeros(pruned))
    with pytest.raises(RuntimeError, match="mine"), convexprune.keep_zeros(pruned):
        pruned.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)  # whatever changed it
        raise RuntimeError("mine")
    assert count(zeros(pruned)) == before
    steps(pruned, OPTIMIZERS["AdamW"](pruned.parameters()))
    assert count(zeros(pruned)) < before / 100


def test_a_model_without_zeros_or_that_is_not_here_is_refused(build: Build):
    away: Any = build("llama")
    for model, said in ((build("llama"), "No matrix of the model has zeros"), (away.to("meta"), "not in memory")):
        with pytest.raises(errors.ModelError, match=said), convexprune.keep_zeros(model):
            pass


def test_rows_of_an_embedding_are_left_to_train(pruned: Any):
    rows = TOKENS[0, :4]
    pruned.model.embed_tokens.weight.data[rows] = 0
    with convexprune.keep_zeros(pruned):
        steps(pruned, OPTIMIZERS["AdamW"](pruned.parameters()))
    assert pruned.model.embed_tokens.weight[rows].abs().min() > 0


@PEFT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapter_is_merged_without_a_loss(pruned: Any, dtype: torch.dtype, dropout: float):
    before = zeros(pruned.to(dtype))
    torch.manual_seed(0)
    adapted: Any = get_peft_model(pruned, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=dropout))
    with convexprune.keep_zeros(adapted) as kept, torch.random.fork_rng(devices=[]):
        assert sum(kept.values()) == count(before)
        steps(adapted, OPTIMIZERS["AdamW"]([p for p in adapted.parameters() if p.requires_grad]), 5)
        with torch.no_grad():
            trained = adapted.eval()(input_ids=TOKENS).logits
            with adapted.disable_adapter():
                dense = adapted(input_ids=TOKENS).logits
        merged = adapted.merge_and_unload()
    after = zeros(merged)
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        now = merged(input_ids=TOKENS).logits
    learnt = (trained - dense).abs().max()
    assert learnt > 0.1 and (now - trained).abs().max() < learnt * (1e-4 if dtype == torch.float32 else 0.2)


@PEFT
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("family", "name"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_an_adapter_in_training_adds_nothing_to_zero_weights(family: str, name: str, dropout: float):
    pruned = convexprune.prune(build_family(family), method="magnitude", **SMALL_FAMILY).model
    given: dict[str, Any] = {"target_modules": [name], "fan_in_fan_out": family == "gpt2", "init_lora_weights": False}
    config = LoraConfig(r=4, lora_dropout=dropout, **given)
    adapted: Any = get_peft_model(pruned, config)
    layer = next(module for key, module in adapted.named_modules() if key.endswith(name))
    weight = layer.base_layer.weight.data.T if family == "gpt2" else layer.base_layer.weight.data
    weight[0] = 0
    with convexprune.keep_zeros(adapted), torch.no_grad():
        x = torch.randn(2, 5, weight.shape[1])
        added = layer.train()(x) - layer.base_layer(x)
    assert added[..., 0].abs().max() < 1e-5 and added[..., 1].abs().max() > 0.01


KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "of a parameter": {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
}


@PEFT
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_kind_is_refused(pruned: Any, kind: str):
    adapted = get_peft_model(pruned, LoraConfig(r=2, **KINDS[kind]))
    with pytest.raises(errors.ModelError, match=r"q_proj: an adapter of another kind"), convexprune.keep_zeros(adapted):
        pass
    before = count(zeros(pruned))
    steps(adapted, OPTIMIZERS["AdamW"]([p for p in adapted.parameters() if p.requires_grad]), 1)
    assert count(zeros(pruned)) == before  # nothing of the refused attempt is left


def test_the_trainer_keeps_them(pruned: Any, tmp_path: Path):
    before = zeros(pruned)
    examples = [{"input_ids": row, "labels": row} for row in TOKENS]
    settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=0.01, weight_decay=0.1, **settings)
    trainer = Trainer(pruned, arguments, train_dataset=examples, callbacks=[convexprune.KeepZeros()])  # pyright: ignore
    trainer.train()
    assert all(torch.equal(after, before[name]) for name, after in zeros(pruned).items())
    steps(pruned, OPTIMIZERS["AdamW"](pruned.parameters()), 1)
    assert count(zeros(pruned)) < count(before) / 100  # it has let go
