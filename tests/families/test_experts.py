"""Experts: each is pruned on the tokens that are routed to it, and what routes them is left alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_families import GROUPED, SMALL, TOKENS, build_family, on_disk, weights
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import convexprune
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune.adapters import HuggingFaceModel
from convexprune.pruners import Convex

MOE = ["deepseek_v2", "gpt_oss", "llama4_text", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", MOE)
def test_routers_are_never_pruned_and_are_listed(family: str):
    model = HuggingFaceModel(build_family(family))
    routing = [name for name, reason in model.left_alone if reason == "routes tokens to experts"]
    assert len(routing) == len(model.layers) - {"deepseek_v2": 1, "llama4_text": 2}.get(family, 0)
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
    for seen in tokens.values():
        assert sum(seen) * 4 // len(seen) == model.config.num_experts_per_tok * TOKENS.numel()
        assert len(set(seen)) > 1


def test_a_fused_expert_gets_the_moments_of_its_own_tokens(monkeypatch: pytest.MonkeyPatch):
    from convexprune._layerwise import pipeline as room

    def keep(_: Any, stacks: list[Any], began: float):
        for stack in stacks:
            moments.setdefault(stack.group.operators[0].name, stack.statistics.total)

    model, moments = build_family("gpt_oss"), {}
    monkeypatch.setattr(room, "run_steps", keep)
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
    starved, shared = CalibrationStatistics(6, torch.device("cpu")), CalibrationStatistics(6, torch.device("cpu"))
    own, others = torch.randn(1, 2, 6), torch.randn(4, 7, 6)
    starved.add(own, None, False)
    shared.add(others, None, False)
    starved.shrink_towards(shared)
    assert (starved.tokens, starved.borrowed, starved.total.tokens) == (2, 4, 6)
    mean = others.flatten(0, 1).T @ others.flatten(0, 1) / 28
    torch.testing.assert_close(starved.total.gram, (own[0].T @ own[0] + 4 * mean) / 6)
    rich = CalibrationStatistics(4, torch.device("cpu"))
    rich.add(x, None, False)
    rich.shrink_towards(rich)
    assert rich.borrowed == 0 and rich.total.tokens == 35


def test_experts_are_pruned_alike_however_many_have_room(monkeypatch: pytest.MonkeyPatch):
    from convexprune._layerwise import statistics as room

    results = []
    for bytes_ in (4 << 30, 1):
        monkeypatch.setattr(room, "ROOM", bytes_)
        model = build_family("mixtral")
        convexprune.prune(model, method="sparsegpt", **SMALL)
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.long
@pytest.mark.parametrize("family", MOE)
def test_experts_fit_and_judge_the_same_tokens_in_batches_of_any_size(family: str):
    """The samples of a batch fall into halves one by one: a single batch had no second half, so no damping by noise."""
    found = []
    for batch_size in (1, 2, 4):
        settings = SMALL | {"batch_size": batch_size, "targets": [r"re:.*\.experts"]}
        model = build_family(family)
        report = convexprune.prune(model, **settings).report
        first = [o for o in report.operators if o.inputs == model.config.hidden_size]  # others see rounded masks
        found.append([(o.tokens, o.damping.levelling, o.damping.ridge) for o in first if o.damping])
    assert any(levelling for _, levelling, _ in found[0])
    for others in found[1:]:
        for (tokens, *damping), (same, *expected) in zip(others, found[0], strict=True):
            assert tokens == same
            assert damping == pytest.approx(expected, rel=1e-3)


def test_the_experts_on_disk_are_as_the_checkpoint_had_them(tmp_path: Path):
    for family, names in {
        "mixtral": ["model.layers.0.block_sparse_moe.experts.3.w1.weight"],
        "qwen3_moe": ["model.layers.0.mlp.experts.3.up_proj.weight"],
        "gpt_oss": ["model.layers.0.mlp.experts.gate_up_proj"],
    }.items():
        convexprune.prune(build_family(family), method="magnitude", **SMALL, output_dir=tmp_path / family)
        assert set(names) <= on_disk(tmp_path / family).keys()


def test_experts_that_are_multiplied_in_an_unknown_way_are_left_alone_with_their_router(
    monkeypatch: pytest.MonkeyPatch,
):
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = torch.einsum("etn,enm->etm", x.view(4, -1, x.shape[-1]), self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("etn,enm->etm", up * self.act_fn(gate), self.down_proj).flatten(0, 1)

    monkeypatch.setattr(Llama4TextExperts, "forward", forward)
    model = HuggingFaceModel(build_family("llama4_text"))
    alone = {n.removeprefix("model.layers.2.feed_forward."): r for n, r in model.left_alone if "layers.2" in n}
    assert alone.pop("router") == "routes tokens to experts"
    assert alone == dict.fromkeys(
        ("experts.gate_up_proj", "experts.down_proj"), "in a Llama4TextExperts, no known linear map"
    )
    assert [o.name for o in model.layers[2].operators][-1] == "feed_forward.shared_expert.down_proj"
    report = convexprune.prune(model.model, method="magnitude", **SMALL).report
    (told,) = (warning for warning in report.warnings if "not known" in warning)
    assert told.startswith("30% of the parameters of the decoder layers are left as they are, in 2 matrices")


def test_a_model_that_was_pruned_in_place_runs_its_experts_as_before():
    model = build_family("mixtral")
    own = getattr(model.config, "_experts_implementation", None)
    convexprune.prune(model, method="wanda", **SMALL)
    assert getattr(model.config, "_experts_implementation", None) == own
    assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


SIDE_BY_SIDE: dict[str, dict[str, Any]] = {
    "default": {"bound_rows": 2},
    "few tokens": {"num_calibration_samples": 1, "pattern": "2:4"},  # experts borrow, and some have no token at all
    "grids": {"quantize": "int4", "group_size": -1, "pattern": "2:4"},
    "rules": {
        "rules": [{"targets": [r"re:.*experts.*\.1"], "sparsity": 0.3}, {"targets": [r"re:.*\.3"], "method": "wanda"}]
    },
}


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_experts_solved_side_by_side_are_those_solved_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch):
    from convexprune._layerwise import pipeline as room

    asked, prune_all = list[int](), Convex.prune_all

    def run() -> Any:
        settings: dict[str, Any] = SMALL | {"targets": [r"re:.*layers\.0\..*experts.*"]} | SIDE_BY_SIDE[name]
        return convexprune.prune(build_family("mixtral"), **settings)

    alone = run()
    monkeypatch.setattr(room, "at_once", lambda shape, pruner, device: 3 if pruner.side_by_side else 1)
    monkeypatch.setattr(Convex, "prune_all", lambda self, some: asked.append(len(some)) or prune_all(self, some))
    together = run()
    assert 3 in asked
    own = weights(alone.model)
    assert all(torch.equal(tensor == 0, own[place] == 0) for place, tensor in weights(together.model).items())
    for one, other in zip(alone.report.operators, together.report.operators, strict=True):
        same = ("name", "zeros", "pattern", "products", "solves", "status", "tokens", "damping", "facts")
        assert all(getattr(one, each) == getattr(other, each) for each in same)
        for each in ("relative_error", "gap", "largest_gap"):
            mine, theirs = getattr(other, each), getattr(one, each)
            assert mine is theirs is None or mine == pytest.approx(theirs, rel=1e-3)
        assert (one.bound is None) == (other.bound is None)


@pytest.mark.skipif(not hasattr(transformers, "MiniMaxM2Config"), reason="transformers 4 does not know it")
def test_a_buffer_that_is_stored_under_another_name_is_no_fault_of_what_was_written(tmp_path: Path):
    sizes: dict[str, Any] = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 8}
    transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**sizes)).save_pretrained(tmp_path / "dense")
    result = convexprune.prune(tmp_path / "dense", method="wanda", output_dir=tmp_path / "out", **SMALL)
    assert result.report.sparsity == 0.5
