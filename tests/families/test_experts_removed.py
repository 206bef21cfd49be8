"""Experts removed for good: the smaller model is that of transformers, and computes as if no token went to them."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from runs import require_resumed
from tiny_families import FAMILIES, TOKENS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import convexprune
from convexprune._api.calls import plan
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._removal.experts import ExpertRemoval, find_experts, small_blocks
from convexprune.adapters._removal.mixtures import Judged, chosen, recording
from convexprune.constraints import Experts
from convexprune.errors import ModelError, OutputError, PatternError, RecipeError
from convexprune.validation import compare, verify

SMALL: dict[str, Any] = {
    "dataset": TOKENS, "num_calibration_samples": 3, "held_out_samples": 1, "pattern": "experts", "sparsity": 0.25,
    "bound_rows": 0, "threads": 1,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "moe_intermediate_size": 24,
}  # fmt: skip


def sized(**own: Any) -> dict[str, Any]:
    return SIZES | own


GROUPED: dict[str, Any] = SIZES | {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "n_shared_experts": 1,
}  # fmt: skip
MIXTURES: dict[str, Callable[[], Any]] = {
    **{name: FAMILIES[name] for name in ("deepseek_v2", "gpt_oss", "llama4_text", "mixtral", "qwen3_moe")},
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**GROUPED)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**sized(shared_expert_intermediate_size=24, num_experts=4, num_experts_per_tok=2))
    ),
    "jamba": lambda: t.JambaForCausalLM(  # with one expert its block is another class
        t.JambaConfig(**sized(num_experts=4, expert_layer_offset=0, attn_layer_offset=0, attn_layer_period=1))
    ),
    "ernie4_5_moe": lambda: t.Ernie4_5_MoeForCausalLM(
        t.Ernie4_5_MoeConfig(**sized(moe_num_experts=4, moe_k=2, moe_layer_start_index=1))
    ),
}


def made(family: str) -> HuggingFaceModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HuggingFaceModel(MIXTURES[family]().eval())


def mixtral(experts: int, seed: int = 0, **others: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return t.MixtralForCausalLM(
            t.MixtralConfig(**sized(num_local_experts=experts, num_experts_per_tok=2, **others))
        ).eval()


def without(model: HuggingFaceModel, *numbers: int) -> ExpertRemoval:
    """The model without the same experts in all layers."""
    found = find_experts(model, Experts(len(numbers) / find_experts(model, Experts(0.25)).size))
    return found.without({mixture.layer: list(numbers) for mixture in found.mixtures})


def empty(model: HuggingFaceModel, reduced: ExpertRemoval) -> None:
    for layer in model.layers:
        model.load_state(layer, reduced.emptied(layer.name, dict(layer.module.named_parameters())))


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_every_family_is_left_with_the_other_experts(family: str):
    """By hand: of each tensor that is smaller in transformers' model of the new size, the entries of these experts."""
    model = made(family)
    gone = (1, 6) if family == "deepseek_v3" else (1,)
    reduced = without(model, *gone)
    ((name, (before, after)),) = reduced.widths.items()
    config = type(model.model.config).from_dict(model.model.config.to_dict() | {name: after})
    twin, kept = type(model.model)(config).eval(), [n for n in range(before) if n not in gone]
    for path, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        parts = path.split(".")
        if "experts" in parts and parts[parts.index("experts") + 1].isdigit():  # one module for each, in transformers 4
            at = parts.index("experts") + 1
            parts[at] = str(kept[int(parts[at])])
        whole = dict(model.model.named_parameters()) | dict(model.model.named_buffers())
        old = whole[".".join(parts)]
        dims = [dim for dim, (a, b) in enumerate(zip(old.shape, tensor.shape, strict=True)) if a != b]
        tensor.copy_(old.index_select(dims[0], torch.tensor(kept)) if dims else old)
    shorter, dense = reduced.model(model), model.model(TOKENS).logits
    assert torch.equal(shorter(TOKENS).logits, twin(TOKENS).logits)
    assert reduced.sizes(model)["parameters"][1] == sum(p.numel() for p in twin.parameters())
    reduced.stand_in(model)
    assert torch.equal(model.model(TOKENS).logits, dense)  # as long as it is dense
    empty(model, reduced)
    assert torch.equal(model.model(TOKENS).logits, twin(TOKENS).logits)
    with pytest.raises(ModelError, match="it should be"):
        reduced.without({})


@torch.no_grad()
def test_it_computes_as_the_dense_model_whose_router_never_takes_them():
    """A bias of the router can say so: no other part of the code is needed for that."""
    model = made("gpt_oss")
    shorter = without(model, 0, 2).model(model)(TOKENS).logits
    for name, parameter in model.model.named_parameters():
        if name.endswith("router.bias"):
            parameter[[0, 2]] = -1e9
    torch.testing.assert_close(shorter, model.model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_models_without_experts_that_count_are_refused():
    with pytest.raises(ModelError, match="has no mixture of experts"):
        find_experts(HuggingFaceModel(FAMILIES["llama"]().eval()), Experts(0.25))


class Partial(t.MixtralForCausalLM):
    """Its first expert is not like the others: a planted fault, which no shape shows."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_hook(_with_first)


def _with_first(layer: nn.Module, _: Any, output: Any) -> Any:
    more = next(p for name, p in layer.named_parameters() if "experts" in name).flatten()[:32]
    return output + more if isinstance(output, Tensor) else (output[0] + more, *output[1:])


def test_experts_that_cannot_take_each_others_place_are_refused():
    model = Partial(t.MixtralConfig(**sized(num_local_experts=5))).eval()
    with pytest.raises(ModelError, match=r"how many experts its mixtures have \(5\)"):
        find_experts(HuggingFaceModel(model), Experts(0.4))


@pytest.mark.parametrize(
    ("family", "share", "told"),
    [
        ("mixtral", 0.75, r"does not run with 1 of its 4 experts: .* Take sparsity 0\.5 for 2 or 0\.25 for 3\."),
        ("deepseek_v3", 0.125, r"does not run with 7 of its 8 experts: .* groups of one size\. .* 0\.25 for 6"),
        ("jamba", 0.75, r"does not run with 1 of its 4 experts: .* Take sparsity 0\.5 for 2 or 0\.25 for 3\."),
        (
            "mixtral",
            0.1,
            r"Sparsity 0\.1 of 4 experts rounds to 0\. Accepted: 0\.25 for one of them, to 0\.75",
        ),
        ("mixtral", 0.9, r"Sparsity 0\.9 of 4 experts rounds to 4\. Accepted: 0\.25"),
    ],
)
def test_a_number_that_cannot_be_had_is_refused_with_those_that_can(family: str, share: float, told: str):
    with pytest.raises(PatternError, match=told):
        find_experts(made(family), Experts(share))


# ---- which experts


def judged(model: HuggingFaceModel, count: int) -> tuple[Judged, nn.Module, Tensor]:
    """The first mixture, its block, and what enters it."""
    found = find_experts(model, Experts(count / find_experts(model, Experts(0.25)).size))
    block = model.model.get_submodule(found.mixtures[0].block)
    with torch.no_grad(), recording(block) as inputs:
        model.model(TOKENS)
    small = small_blocks(model, found.place, found.mixtures, found.size - count)[0]
    return Judged(found.mixtures[0], block, small, inputs), block, inputs[0][0][0]


@torch.no_grad()
def test_the_score_of_reap_is_that_of_its_formula():
    judge, block, x = judged(HuggingFaceModel(mixtral(6)), 2)
    state, scores = block.state_dict(), []
    weights, experts = (x.reshape(-1, 32) @ state["gate.weight"].T).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    for number in range(6):
        if "experts.gate_up_proj" in state:
            gate, up = state["experts.gate_up_proj"][number].chunk(2)
            down = state["experts.down_proj"][number]
        else:
            gate, down, up = (state[f"experts.{number}.w{i}.weight"] for i in (1, 2, 3))
        tokens, place = (experts == number).nonzero(as_tuple=True)
        own = x.reshape(-1, 32)[tokens]
        made = (torch.nn.functional.silu(own @ gate.T) * (own @ up.T)) @ down.T
        scores.append(float((weights[tokens, place] * made.norm(dim=-1)).mean()))
        assert judge.reap(number) == pytest.approx(scores[-1], rel=1e-4)
    assert set(chosen(judge, "reap", 2)) == set(sorted(range(6), key=scores.__getitem__)[:2])
    assert torch.equal(judge.dense[0], block(x) if isinstance(block(x), Tensor) else block(x)[0])  # as it was


@torch.no_grad()
def test_exchanges_find_the_experts_without_which_the_output_changes_least():
    exchanged = 0
    for seed in range(3):
        judge, _, _ = judged(HuggingFaceModel(mixtral(6, seed)), 2)
        errors = {pair: judge.error(pair) for pair in combinations(range(6), 2)}
        best = min(errors, key=errors.__getitem__)
        assert tuple(sorted(chosen(judge, "output", 2))) == best
        exchanged += tuple(sorted(chosen(judge, "reap", 2))) != best
    assert exchanged  # or nothing had to be


# ---- a run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a model with three layers, in several shards."""
    mixtral(4, num_hidden_layers=3).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    return tmp_path / "dense"


def test_the_result_is_an_ordinary_smaller_folder(source: Path, tmp_path: Path):
    result = convexprune.prune(source, **SMALL, output_dir=tmp_path / "out", evaluation=TOKENS)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(result.model(TOKENS).logits, smaller(TOKENS).logits)
    note = json.loads((tmp_path / "out" / "experts.json").read_text())
    assert note["widths"] == {"num_local_experts": [4, 3]} and smaller.config.num_local_experts == 3
    dense = AutoModelForCausalLM.from_pretrained(source)
    reduced = without(HuggingFaceModel(dense), 0).without(note["removed"])
    changed = {f"{o.name}.weight" for o in result.report.operators}
    for name, tensor in reduced.state(dense.state_dict()).items():
        assert torch.equal(tensor, smaller.state_dict()[name]) != (name in changed)
    assert changed and all(".self_attn." in name and name.split(".")[2] != "0" for name in changed)
    with torch.no_grad():
        ours = torch.nn.functional.cross_entropy(smaller(TOKENS).logits[:, :-1].transpose(1, 2), TOKENS[:, 1:])
    assert result.report.perplexity["pruned"]["nll"] == pytest.approx(float(ours), rel=1e-5)
    assert "experts.json" in result.report.files and "removed experts" in (tmp_path / "out" / "README.md").read_text()
    found = verify(tmp_path / "out", dataset=TOKENS, sample=1)
    assert found.passed and found.errors, found.faults
    here = convexprune.prune(source, **SMALL)
    assert here.report.narrowed == result.report.narrowed
    assert all(torch.equal(tensor, smaller.state_dict()[name]) for name, tensor in here.model.state_dict().items())
    path = tmp_path / "out" / "experts.json"
    path.write_text(path.read_text().replace("[", "[1, ", 1))
    with pytest.raises(OutputError, match=r"experts\.json is damaged"):
        verify(tmp_path / "out", dataset=TOKENS)


def test_a_model_that_streams_loses_its_experts_tensor_by_tensor(tmp_path: Path):
    """By REAP, which changes nothing else."""
    made("gpt_oss").model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    result = convexprune.prune(tmp_path / "dense", **SMALL, method="reap", output_dir=tmp_path / "out")
    assert result.report.environment["loading"] == "layer by layer"
    dense = HuggingFaceModel(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    note = json.loads((tmp_path / "out" / "experts.json").read_text())
    expected = without(dense, 0).without(note["removed"]).state(dense.model.state_dict())
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert expected.keys() == smaller.keys() and all(torch.equal(smaller[name], t) for name, t in expected.items())


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(source: Path, tmp_path: Path):
    require_resumed(source, tmp_path, **SMALL)


def test_what_does_not_fit_is_refused_before_any_work(source: Path, tmp_path: Path):
    def refused(error: type[Exception], match: str, **given: Any) -> None:
        with pytest.raises(error, match=match):
            convexprune.prune(given.pop("model", source), **SMALL | given, output_dir=tmp_path / "out")

    refused(PatternError, "Leave quota out", quota="row")
    refused(PatternError, "removes whole experts. Take method 'convex' or 'reap'", method="wanda")
    refused(PatternError, "REAP removes experts, and pattern", method="reap", pattern="layers")
    refused(PatternError, "ShortGPT removes decoder layers, and pattern", method="shortgpt")
    refused(PatternError, "Experts are removed before a model is quantized", quantize="int4")
    refused(RecipeError, "Leave targets and ignore out", targets=["o_proj"])
    refused(RecipeError, "Leave prefix out", prefix="dense")
    refused(RecipeError, "no rule is about parts", rules=[{"targets": ["o_proj"], "sparsity": 0.2}])
    refused(ModelError, "makes a smaller model, and a loaded one is pruned in place", model=mixtral(4))
    for method in ("convex", "reap"):
        assert plan(model=source, output_dir=tmp_path / "out", method=method, **SMALL).operators == 8
    with pytest.raises(RecipeError, match="verify the folder of the run"):
        verify(source, pattern="experts", sparsity=0.25)
    with pytest.raises(RecipeError, match="Pattern 'experts' is compared by"):
        compare(
            source, methods=["fista"], patterns=["experts"], sparsities=[0.25], conventions=["pruned-layer"],
            dataset=TOKENS, output=tmp_path / "compared",
        )  # fmt: skip
