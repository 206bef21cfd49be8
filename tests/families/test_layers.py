"""Decoder layers removed for good: the smaller model computes what the dense one does with zeros in their place."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from runs import require_resumed
from tiny_families import FAMILIES, TOKENS
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

import convexprune
from convexprune._api.calls import plan
from convexprune.adapters import HuggingFaceModel, load
from convexprune.adapters._checkpoints.shards import stored_as
from convexprune.adapters._removal.shortening import (
    Shortening,
    divergences,
    find_shortening,
    influences,
    layers_to_remove,
)
from convexprune.constraints import Layers
from convexprune.errors import ModelError, OutputError, PatternError, RecipeError
from convexprune.validation import compare, verify

SMALL: dict[str, Any] = {
    "dataset": TOKENS, "num_calibration_samples": 3, "held_out_samples": 1, "pattern": "layers", "sparsity": 0.4,
    "bound_rows": 0, "threads": 1,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
FIRST = {"deepseek_v2": [1, 2]}  # its first layer has no experts, and its configuration says that the first has none


def made(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a model of five layers, in several shards."""
    made(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    return tmp_path / "dense"


COMPARED: dict[str, Any] = {
    "methods": ["fista"], "patterns": ["layers"], "sparsities": [0.4], "conventions": ["pruned-layer"],
    "dataset": TOKENS,
}  # fmt: skip


@torch.no_grad()
def logits_without(model: HuggingFaceModel, numbers: list[int]) -> Tensor:
    """Those of the dense model, whose layers are called by hand; these are left out."""
    hidden, calls = model.first_inputs(TOKENS), model.calls(TOKENS)
    for number, (layer, call) in enumerate(zip(model.layers, calls, strict=True)):
        hidden = hidden if number in numbers else call(layer.module, hidden)
    return model.logits(TOKENS, hidden)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_left_with_the_other_layers(family: str):
    torch.manual_seed(0)
    model = HuggingFaceModel(FAMILIES[family]())
    count = len(model.layers)
    if family == "opt, 350M":  # its norms come after the sums
        with pytest.raises(ModelError, match="does not hand on what it gets"):
            find_shortening(model, Layers(1 / count))
        return
    found = find_shortening(model, Layers(1 / count))
    assert list(found.allowed) == FIRST.get(family, list(range(count)))
    for number in found.allowed:
        reduced = found.without([number])
        shorter = reduced.model(model)
        torch.testing.assert_close(shorter(TOKENS).logits, logits_without(model, [number]), rtol=1e-6, atol=1e-6)
        assert reduced.sizes(model)["parameters"][1] == sum(p.numel() for p in shorter.parameters())
        assert [*reduced.note()["widths"].values()] == [[count, count - 1]]
    with pytest.raises(ModelError, match=r"cannot go: 1 of"):
        found.without([])


@torch.no_grad()
def test_what_a_configuration_says_of_each_layer_goes_with_it():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, layer_types=kinds)
    model = HuggingFaceModel(made(config))
    shorter = find_shortening(model, Layers(0.4)).without([1, 3]).model(model)
    assert shorter.config.layer_types == [kinds[0], kinds[2], kinds[4]]
    torch.testing.assert_close(shorter(TOKENS).logits, logits_without(model, [1, 3]), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.15"), reason="its cache counts tokens elsewhere")
def test_the_last_layer_of_attention_stays():
    """transformers' cache counts tokens in such a layer alone: without one, a saved model could not generate."""
    sizes: dict[str, Any] = LLAMA | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    sizes |= {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    sizes |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "head_dim": 8}
    sizes |= {"linear_value_head_dim": 8}
    model = HuggingFaceModel(made(Qwen3NextConfig(**sizes, shared_expert_intermediate_size=16)))
    assert find_shortening(model, Layers(0.25)).allowed == (0, 1, 2, 3)  # another one stays
    found = find_shortening(model, Layers(0.5))
    assert found.allowed == (0, 1, 2)
    for gone in ([0, 1], [1, 2], [0, 2]):
        shorter: Any = found.without(gone).model(model)
        assert shorter.generate(TOKENS[:1], max_new_tokens=2).shape[1] == TOKENS.shape[1] + 2


def test_layers_that_depend_on_their_number_are_refused():
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx makes each layer depend on its number"):
        find_shortening(HuggingFaceModel(made(config)), Layers(1 / 3))
    places = GPT2Config(vocab_size=128, n_embd=32, n_layer=4, n_head=4)
    model = HuggingFaceModel(made(places))  # four heads, too: only one of the two numbers is that of the layers
    assert find_shortening(model, Layers(0.25)).place == ("n_layer",)


def test_a_model_of_which_no_configuration_has_the_rest_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Shortening, "why_not", lambda *_: "every second layer has experts")
    with pytest.raises(ModelError, match=r"2 of its 5 decoder layers cannot go, .* \(every second layer has experts\)"):
        find_shortening(HuggingFaceModel(made(LlamaConfig(**LLAMA))), Layers(0.4))


# ---- which layers


@torch.no_grad()
def test_the_scores_are_those_of_the_model_without_each_layer():
    model = HuggingFaceModel(made(LlamaConfig(**LLAMA)))
    dense = logits_without(model, [])[:, :-1].double().log_softmax(-1)
    states = model.model(TOKENS, output_hidden_states=True).hidden_states
    last = model.layers[4].module(states[4], **model.calls(TOKENS)[4].kwargs)
    for (before, after), score in zip(pairwise(states), influences(model, TOKENS, list), strict=True):
        assert score == pytest.approx(1 - float(torch.cosine_similarity(before, after, -1).mean()), abs=1e-5)

    def divergence(gone: list[int]) -> float:
        other = logits_without(model, gone)[:, :-1].double().log_softmax(-1)
        return float((dense.exp() * (dense - other)).sum(-1).mean())

    final = [layer_output.unsqueeze(0) for layer_output in last]
    found = divergences(model, TOKENS, final, [1], [0, 2, 3, 4], list)
    assert found == pytest.approx({number: divergence([1, number]) for number in (0, 2, 3, 4)}, rel=1e-4)
    best = min(range(5), key=lambda number: divergence([number]))
    then = min(set(range(5)) - {best}, key=lambda number: divergence([best, number]))
    assert layers_to_remove(model, TOKENS, "divergence", range(5), 2, list) == [best, then]
    order = sorted((2, 3, 4), key=influences(model, TOKENS, list).__getitem__)
    assert layers_to_remove(model, TOKENS, "influence", (2, 3, 4), 2, list) == order[:2]


@pytest.mark.trained
def test_those_behind_make_up_for_it():
    """On a model that was trained, and on text that nothing was fitted on."""
    begin = torch.arange(40)[:, None] + 100
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        writer = load("opt-books", device="cpu", dtype=torch.float32).model
        tokens = writer.generate(begin, max_length=96, min_length=96, do_sample=True)  # pyright: ignore[reportCallIssue]

    def divergence(**given: Any) -> float:
        settings: dict[str, Any] = {"pattern": "layers", "sparsity": 0.25, "dtype": "float32", "bound_rows": 0} | given
        settings |= {"dataset": tokens, "num_calibration_samples": 34, "held_out_samples": 6, "max_seq_length": 96}
        result = convexprune.prune(**settings, evaluation="held-out", batch_size=4)
        assert result.report.narrowed and result.report.narrowed["num_hidden_layers"] == [4, 3]
        return result.report.perplexity["pruned"]["kl"]

    assert divergence() < 0.85 * divergence(method="shortgpt")


@pytest.mark.parametrize("numbers", [[0, 2, 3], [1, 4], [0, 1, 2, 3, 4]])
def test_numbers_of_layers_become_those_that_they_have_then(numbers: list[int]):
    settings = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    model = HuggingFaceModel(made(Qwen3MoeConfig(**settings, mlp_only_layers=numbers)))
    found = find_shortening(model, Layers(0.4))
    assert found.allowed == (0, 1, 2, 3, 4)
    shorter = found.without([1, 3]).configured(model.model.config.to_dict())
    assert shorter["mlp_only_layers"] == [{0: 0, 2: 1, 4: 2}[number] for number in numbers if number not in (1, 3)]


# ---- a run


def test_the_result_is_an_ordinary_smaller_folder(source: Path, tmp_path: Path):
    result = convexprune.prune(source, **SMALL, output_dir=tmp_path / "out", evaluation=TOKENS)
    assert result.report.environment["loading"] == "layer by layer"
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(result.model(TOKENS).logits, shorter(TOKENS).logits)
    note = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert note["widths"] == {"num_hidden_layers": [5, 3]} and shorter.config.num_hidden_layers == 3
    kept = [number for number in range(5) if number not in note["removed"]]
    dense = AutoModelForCausalLM.from_pretrained(source)
    changed = {o.name for o in result.report.operators}
    for new, old in enumerate(kept):
        for name, tensor in dense.model.layers[old].named_parameters():
            same = torch.equal(tensor, shorter.get_parameter(f"model.layers.{new}.{name}"))
            assert same != (f"model.layers.{old}.{name}".removesuffix(".weight") in changed)
    assert changed and all(int(name.split(".")[2]) > note["removed"][0] for name in changed)
    with torch.no_grad():
        ours = torch.nn.functional.cross_entropy(shorter(TOKENS).logits[:, :-1].transpose(1, 2), TOKENS[:, 1:])
    assert result.report.perplexity["pruned"]["nll"] == pytest.approx(float(ours), rel=1e-5)
    assert "layers.json" in result.report.files and "decoder layers" in (tmp_path / "out" / "README.md").read_text()
    here = convexprune.prune(source, **SMALL)
    assert here.report.narrowed == result.report.narrowed
    assert all(torch.equal(t, shorter.state_dict()[name]) for name, t in here.model.state_dict().items())


@pytest.mark.parametrize("pattern", ["layers", "heads", "channels:8"])
def test_an_infinite_setting_of_a_folder_is_infinite(pattern: str, tmp_path: Path):
    """Release 5 writes it as {"__float__": "Infinity"}. Its two entries are not those of two layers."""
    settings: dict[str, Any] = LLAMA | {"num_hidden_layers": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4}
    settings |= {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    made(FalconH1Config(**settings)).save_pretrained(tmp_path / "dense")
    convexprune.prune(tmp_path / "dense", **SMALL | {"pattern": pattern, "sparsity": 0.5}, output_dir=tmp_path / "out")
    dense, small = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "out"))
    assert small.get("time_step_limit") == dense.get("time_step_limit")
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits.isfinite().all()


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(source: Path, tmp_path: Path):
    require_resumed(source, tmp_path, **SMALL)


def test_verify_judges_a_run(source: Path, tmp_path: Path):
    convexprune.prune(source, **SMALL, output_dir=tmp_path / "out")
    found = verify(tmp_path / "out", dataset=TOKENS)
    assert found.passed and found.errors, found.faults
    path = tmp_path / "out" / "layers.json"
    path.write_text(path.read_text().replace("[", "[1, ", 1))
    with pytest.raises(OutputError, match=r"layers\.json is damaged"):
        verify(tmp_path / "out", dataset=TOKENS)


def test_what_does_not_fit_is_refused_before_any_work(
    source: Path, build: Callable[[str], PreTrainedModel], tmp_path: Path
):
    def refused(error: type[Exception], match: str, **given: Any) -> None:
        with pytest.raises(error, match=match):
            convexprune.prune(given.pop("model", source), **SMALL | given, output_dir=tmp_path / "out")

    refused(
        PatternError,
        r"of 5 decoder layers rounds to 0\. Accepted: 0\.2 for one of them, to 0\.8 for all",
        sparsity=0.05,
    )
    refused(PatternError, r"of 5 decoder layers rounds to 5\. Accepted", sparsity=0.95)
    refused(PatternError, "Leave quota out", quota="row")
    refused(PatternError, "removes whole decoder layers. Take method 'convex' or 'shortgpt'", method="sparsegpt")
    refused(PatternError, "ShortGPT removes decoder layers", method="shortgpt", pattern="unstructured")
    refused(PatternError, "Layers are removed before a model is quantized", quantize="int4")
    refused(RecipeError, "Leave targets and ignore out", targets=["down_proj"])
    refused(RecipeError, "Leave prefix out", prefix="dense")
    refused(RecipeError, "no rule is about parts", rules=[{"targets": ["o_proj"], "sparsity": 0.2}])
    refused(ModelError, "makes a smaller model, and a loaded one is pruned in place", model=build("llama"))
    for method in ("convex", "shortgpt"):
        planned = plan(model=source, output_dir=tmp_path / "out", method=method, **SMALL)
        assert (planned.operators, planned.zeros) == (35, 0)
        assert planned.recipe["prefix"] == "pruned"  # so that no layers can be spread
    with pytest.raises(RecipeError, match="inspect has no weights"):
        convexprune.inspect(source, pattern="layers", sparsity=0.4)
    with pytest.raises(RecipeError, match="verify the folder of the run"):
        verify(source, pattern="layers", sparsity=0.4)
    with pytest.raises(RecipeError, match="compare has all decoder layers"):
        compare(source, **COMPARED, output=tmp_path / "out")


def test_the_stored_name_has_the_number_of_the_layer_once():
    assert stored_as("h.12.mlp.weight", "transformer.h.12.mlp.weight", "transformer.h.9.mlp.weight") == "h.9.mlp.weight"
    with pytest.raises(ModelError, match="from which the number of its layer is not clear"):
        stored_as("blocks.12.w", "model.layers.12.w", "model.layers.9.w")
