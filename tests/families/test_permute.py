"""Channels in another order: the model computes what it did, N:M prunes less of it, and nothing else is touched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, TOKENS, shaken
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import convexprune
from convexprune._cli import app
from convexprune._layerwise.capture import stage_inputs
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._channels import channels as hidden
from convexprune.adapters._channels import inner_channels as inner
from convexprune.adapters._channels import permuting
from convexprune.adapters._channels.channels import HIDDEN, Axis, Channels, hidden_channels
from convexprune.adapters._channels.inner_channels import inner_channels
from convexprune.adapters._channels.permuting import Permutation, find_permutation
from convexprune.constraints import SemiStructured
from convexprune.errors import CalibrationError, ModelError, OutputError, PatternError, RecipeError

PATTERN = SemiStructured(2, 4)
OTHERS = TOKENS.flip(0, 1)  # that nothing is measured on
HEADS, MLP = "attention heads", "MLP"
LESS = {  # what is found, where it is less than all three
    "gemma3": {HEADS, MLP}, "llava": {HEADS, MLP},  # images become hidden states, too
}  # fmt: skip
SMALL: dict[str, Any] = {"dataset": TOKENS, "num_calibration_samples": 4}
PRUNED: dict[str, Any] = SMALL | {"pattern": "2:4", "bound_rows": 0}


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def permute_channels(adapter: HuggingFaceModel, tokens: torch.Tensor, pattern: SemiStructured) -> Permutation:
    found = find_permutation(adapter, tokens, pattern)
    found.apply(adapter.model)
    return found


def equal(model: Any, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_did(family: str):
    torch.manual_seed(0)
    model = shaken(FAMILIES[family]())
    adapter = HuggingFaceModel(model)
    before, logits = state(model), model(OTHERS).logits
    done = permute_channels(adapter, TOKENS, PATTERN)
    torch.testing.assert_close(model(OTHERS).logits, logits, rtol=1e-4, atol=1e-4)
    found = {HIDDEN if p.channels.name == HIDDEN else HEADS if "[" in p.channels.name else MLP for p in done.permuted}
    assert found == LESS.get(family, {HEADS, MLP, HIDDEN})
    assert (HIDDEN in done.left) == (HIDDEN not in found)
    # Every operator whose inputs stay is named; norms stand before DeepSeek's q_b and kv_b.
    assert bool(done.left) == (family in LESS or family == "deepseek_v2")
    assert all(p.after <= p.before for p in done.permuted) and not equal(model, before)
    for one in reversed(done.permuted):  # undone, it is the model that it was, bit for bit
        one.channels.order(model, torch.tensor(one.order).argsort())
    assert equal(model, before)


def test_looking_for_channels_changes_nothing(tiny_llama: HuggingFaceModel):
    before = state(tiny_llama.model)
    assert inner_channels(tiny_llama) and hidden_channels(tiny_llama)
    assert equal(tiny_llama.model, before)


def test_the_axes_of_llama(tiny_llama: HuggingFaceModel):
    """Two heads of q for each of v: what v makes is read at two places, and is permuted at both alike."""
    found = {one.name: one for one in inner_channels(tiny_llama)}
    assert found["model.layers.0.self_attn.o_proj[16]"] == Channels(
        "model.layers.0.self_attn.o_proj[16]",
        8,
        (Axis("model.layers.0.self_attn.v_proj.weight", 0, 8),),
        (Axis("model.layers.0.self_attn.o_proj.weight", 1, 16), Axis("model.layers.0.self_attn.o_proj.weight", 1, 24)),
    )
    mlp = found["model.layers.1.mlp.down_proj"]
    assert {axis.parameter.split(".")[-2] for axis in mlp.axes} == {"gate_proj", "up_proj"}
    assert len(found) == 2 * (2 + 1)


def test_the_scores_are_those_of_all_that_see_the_channels(tiny_llama: HuggingFaceModel):
    """The slow twin, from hooks of the model's own: W_ij^2 mean x_j^2 of gate and up count relative to their sums."""
    model, seen = tiny_llama.model, list[torch.Tensor]()
    mlp = model.get_submodule("model.layers.0.mlp")
    hook = mlp.get_submodule("gate_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS)
    hook.remove()
    consumers, found = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")], list[torch.Tensor]()
    channels = Channels("", 16, (), tuple(Axis(name, 1, 4) for name in consumers))

    def step(context: LayerContext) -> None:
        found.append(permuting._propagate_and_score(context)(channels, 1))

    LayerWalk(tiny_llama, TOKENS.split(3), MemoryStore([0])).run(step)
    (scores,) = found
    weights = [model.get_parameter(name) for name in consumers]
    expected = [w.square() * seen[0].flatten(0, 1).square().mean(0) for w in weights]
    torch.testing.assert_close(scores, torch.cat([each[:, 4:20] / each.sum() for each in expected]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt-bf16", "llama-bf16", "llama-tied"])
def test_other_dtypes_and_tied_weights(build: Callable[[str], Any], name: str):
    model = shaken(build(name))
    logits = model(TOKENS).logits
    done = permute_channels(HuggingFaceModel(model), TOKENS, PATTERN)
    assert {HIDDEN} < {one.channels.name for one in done.permuted} and not done.left
    assert float((model(TOKENS).logits - logits).norm() / logits.norm()) < (0.03 if "bf16" in name else 1e-5)


def test_channels_that_were_taken_wrongly_are_left(tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch):
    """A fault: an axis is forgotten. The model's own outputs tell, and nothing is left changed."""
    whole = inner_channels(tiny_llama)
    wrong = [Channels(one.name, one.size, one.axes[:-1], one.consumers) for one in whole]
    monkeypatch.setattr(permuting, "inner_channels", lambda _: wrong)
    through = hidden_channels(tiny_llama)
    through = Channels(through.name, through.size, through.axes[:-1], through.consumers)
    monkeypatch.setattr(permuting, "hidden_channels", lambda _: through)
    before = state(tiny_llama.model)
    done = permute_channels(tiny_llama, TOKENS, PATTERN)
    assert not done.permuted and {"operators", HIDDEN, "model.layers.*.mlp.down_proj"} < set(done.left)
    assert equal(tiny_llama.model, before)


def test_a_layer_in_which_channels_are_not_alike_is_left(build: Callable[[str], Any]):
    """A fault: the activation has another scale for each channel, of which no operator knows."""
    model = build("llama")

    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(x) * torch.linspace(0.1, 2, x.shape[-1])

    for layer in model.model.layers:
        layer.mlp.act_fn = Scaled()
    names = [one.name for one in inner_channels(HuggingFaceModel(model))]
    assert names and all("self_attn" in name for name in names)


def test_channels_that_make_no_groups_are_named(tiny_llama: HuggingFaceModel):
    done = permute_channels(tiny_llama, TOKENS, SemiStructured(2, 5))
    assert not done.permuted and "no multiple of 5" in done.left["model.layers.0.mlp.down_proj"]


def test_experiments_end_where_they_began_if_a_pass_fails(
    tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch
):
    """A fault in any pass of any experiment leaves the weights as they were."""
    before, left = state(tiny_llama.model), [0]

    def failing(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("planted")
        return stage_inputs(*args)

    for module, find in ((inner, inner_channels), (hidden, hidden_channels)):
        monkeypatch.setattr(module, "stage_inputs", failing)
        failed = 0
        for number in range(1, 1000):
            left[0] = number
            try:
                find(tiny_llama)
                break
            except RuntimeError:
                failed += 1
                assert equal(tiny_llama.model, before)
        assert failed > 5


def test_an_offloaded_model_is_refused(tiny_llama: HuggingFaceModel):
    tiny_llama.model.get_submodule("lm_head").to("meta")
    with pytest.raises(ModelError, match="is offloaded"):
        find_permutation(tiny_llama, TOKENS, PATTERN)


# ---- the door


def test_pruned_after_it_a_model_loses_less(build: Callable[[str], Any]):
    """Wanda and SparseGPT, every operator that sees permuted channels, on a random model."""
    for method in ("wanda", "sparsegpt"):
        settings: dict[str, Any] = PRUNED | {"method": method, "threads": 1}
        plain = convexprune.prune(build("llama"), **settings).report.operators
        permuted = convexprune.permute(build("llama"), **SMALL).model
        after = convexprune.prune(permuted, **settings).report.operators
        ratios = [b.relative_error / a.relative_error for a, b in zip(plain, after, strict=True)]
        assert sum(ratios) / len(ratios) < 0.95 and sum(ratio > 1 for ratio in ratios) <= 2  # they share an order


@pytest.mark.parametrize("name", ["llama-tied", "llama-bf16", "opt"])
def test_a_model_that_streams_is_permuted_as_one_in_memory(build: Callable[[str], Any], tmp_path: Path, name: str):
    """From shards to shards, one decoder layer in memory at a time: the same orders, the same bits."""
    target = tmp_path / "new" / "permuted"
    dense = shaken(build(name))
    dense.save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    streamed = convexprune.permute(tmp_path / "dense", output_dir=target, **SMALL)
    whole = convexprune.permute(tmp_path / "dense", **SMALL)
    assert streamed.permutation == whole.permutation and streamed.output_dir == target
    assert not streamed.permutation.left and len(streamed.permutation.permuted) > 5
    again = AutoModelForCausalLM.from_pretrained(target)
    assert equal(again, state(whole.model)) and equal(streamed.model, state(whole.model))
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in target.iterdir()} == names | {"permutation.json"}
    assert [path.name for path in target.parent.iterdir()] == ["permuted"]  # nothing is left beside it


def test_a_permuted_folder_is_pruned_like_any_other(build: Callable[[str], Any], tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "dense")
    convexprune.permute(tmp_path / "dense", output_dir=tmp_path / "permuted", **SMALL)
    notes = json.loads((tmp_path / "permuted" / "permutation.json").read_text())
    assert notes["pattern"] == "2:4" and [len(one["order"]) for one in notes["permuted"]][-1] == 32
    report = convexprune.prune(tmp_path / "permuted", **PRUNED, output_dir=tmp_path / "pruned").report
    assert all(o.zeros == o.expected_zeros for o in report.operators)
    assert (tmp_path / "pruned" / "permutation.json").is_file()


def test_text_that_a_streamed_model_samples_itself(build: Callable[[str], Any], tmp_path: Path):
    """To sample it has to be whole, for as long as that takes."""
    build("llama").save_pretrained(tmp_path / "dense")
    settings: dict[str, Any] = {"num_calibration_samples": 2, "max_seq_length": 16}
    streamed = convexprune.permute(tmp_path / "dense", output_dir=tmp_path / "permuted", **settings)
    whole = convexprune.permute(tmp_path / "dense", **settings)
    assert streamed.permutation == whole.permutation


def test_a_full_disk_leaves_nothing(build: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convexprune.adapters._saving.write_json", full)
    with pytest.raises(OutputError, match="No space left"):
        convexprune.permute(build("llama"), output_dir=tmp_path / "permuted", **SMALL)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_before_any_work(build: Callable[[str], Any], tmp_path: Path):
    model = build("llama")
    before = state(model)
    (tmp_path / "full").write_text("something")
    with pytest.raises(PatternError, match="does not see the order"):
        convexprune.permute(model, "unstructured", **SMALL)
    with pytest.raises(OutputError, match="already holds something"):
        convexprune.permute(model, output_dir=tmp_path, **SMALL)
    with pytest.raises(RecipeError, match="num_calibration_samples"):
        convexprune.permute(model, dataset=TOKENS, num_calibration_samples=0)
    with pytest.raises(CalibrationError):
        convexprune.permute(model, dataset=TOKENS[:1], num_calibration_samples=2)
    assert equal(model, before)


def test_on_the_command_line(build: Callable[[str], Any], tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "dense")
    options = ["--num-calibration-samples", "2", "--max-seq-length", "16", "--output", str(tmp_path / "permuted")]
    result = CliRunner().invoke(app, ["permute", str(tmp_path / "dense"), *options])
    assert result.exit_code == 0, result.output
    for text in ("model.layers.*.mlp.down_proj", HIDDEN, "permuted model"):
        assert text in result.output
    assert (tmp_path / "permuted" / "config.json").is_file()
