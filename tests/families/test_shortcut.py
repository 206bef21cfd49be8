"""What need not run again is found by watching, and leaving it out changes no bit."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_contexts import context_of
from layer_contexts import pruned as pruned_layer
from tiny_families import VOCABULARY, build_family
from torch import Tensor, nn

import convexprune
from convexprune._layerwise import capture as passes
from convexprune._layerwise.capture import observe
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import Call, DecoderLayer
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.steps.survey import survey
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._discovery.discovery import discover
from convexprune.constraints import Unstructured
from convexprune.pruners import SparseGPT

TOKENS = torch.randint(2, VOCABULARY - 2, (5, 24), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "method": "sparsegpt", "dataset": TOKENS, "num_calibration_samples": 4, "held_out_samples": 1, "batch_size": 2,
    "bound_rows": 0,
}  # fmt: skip


def cached(model: HuggingFaceModel) -> list[str]:
    """The names of the modules that need not run again, in the first layer."""
    layer, call, hidden = model.layers[0], model.calls(TOKENS)[0], model.first_inputs(TOKENS)
    found = observe(layer, lambda _: call, [hidden]).cached.values()
    return [name for name, module in layer.module.named_modules() for way in found if way.module is module]


def pruned(model: Any, **settings: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    result = convexprune.prune(model, **SMALL | settings)
    reports = [asdict(operator) | {"seconds": 0} for operator in result.report.operators]
    return {name: p.clone() for name, p in result.model.named_parameters()}, reports


def no_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "find_cached_submodules", lambda *_: nullcontext())


def assert_same(first: Any, second: Any) -> None:
    assert first[1] == second[1]
    assert all(torch.equal(weight, second[0][name]) for name, weight in first[0].items())


@pytest.mark.parametrize("prefix", ["dense", "pruned"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "gpt2", "mixtral"])
def test_shortcuts_change_no_bit(family: str, prefix: str, monkeypatch: pytest.MonkeyPatch):
    assert cached(HuggingFaceModel(build_family(family))) == ["attn" if family == "gpt2" else "self_attn"]
    short = pruned(build_family(family), prefix=prefix)
    no_shortcuts(monkeypatch)
    assert_same(short, pruned(build_family(family), prefix=prefix))


def test_shortcuts_change_no_bit_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build_family("llama").save_pretrained(tmp_path / "dense")
    short = pruned(tmp_path / "dense", output_dir=tmp_path / "short", bound_rows=2)
    no_shortcuts(monkeypatch)
    assert_same(short, pruned(tmp_path / "dense", output_dir=tmp_path / "long", bound_rows=2))


def test_attention_runs_twice_for_each_batch():
    model, times = HuggingFaceModel(build_family("llama")), Counter[str]()
    context = context_of(model, TOKENS)
    layer = context.layer
    for name, module in layer.module.named_modules():
        module.register_forward_hook(lambda *_, name=name: times.update([name]))
    times.clear()
    pruned_layer(context, LayerSettings(SparseGPT(), Unstructured(0.5)))
    assert times["self_attn.q_proj"] == 2 * 5  # dense, and for o
    assert times["self_attn.o_proj"] == 3 * 5  # dense, and for gate and up, and for down
    assert times["mlp.gate_proj"] == 2 * 5 and times["mlp.down_proj"] == 5
    assert len(context.outputs(replayed=context.replayed)) == 5
    assert times["self_attn.q_proj"] == 2 * 5 and times["self_attn.o_proj"] == 4 * 5
    assert "forward" not in vars(layer.module.get_submodule("self_attn"))


def _scaled(output: Tensor) -> Tensor:
    return output * 2


def _written_to(output: Tensor) -> Tensor:
    return output.mul_(2)


@pytest.mark.parametrize("change", [_scaled, _written_to])
def test_what_is_done_after_the_operator_is_not_left_out(change: Any, monkeypatch: pytest.MonkeyPatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    own = LlamaAttention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output, *others = own(*args, **kwargs)
        return change(output), *others

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert cached(HuggingFaceModel(build_family("llama"))) == []
    short = pruned(build_family("llama"))
    no_shortcuts(monkeypatch)
    assert_same(short, pruned(build_family("llama")))


def test_attention_that_returns_its_weights_is_run_again():
    model = build_family("llama")
    model.set_attn_implementation("eager")
    assert cached(HuggingFaceModel(model)) == []


class Deaf(nn.Module):
    """Returns what `o` returns; but `later`, of a later stage, is in here, too."""

    def __init__(self) -> None:
        super().__init__()
        self.o, self.later = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(x)
        self.later(y)
        return y


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), Deaf()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.first(x))


def test_no_operator_of_a_later_stage_is_left_out():
    module, x = Layer().requires_grad_(False), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    layer: DecoderLayer = discover(module, Call(), x).bind("layer", module)
    assert [[g.operators[0].name for g in s] for s in layer.stages] == [["first"], ["inner.o"], ["inner.later"]]
    assert observe(layer, lambda _: Call(), [x]).cached == {}


def test_a_survey_runs_each_layer_once(monkeypatch: pytest.MonkeyPatch):
    model, runs = HuggingFaceModel(build_family("llama")), list[int]()
    model.layers[-1].module.register_forward_pre_hook(lambda *_: runs.append(1))
    fisher = {f"{la.name}.{o.name}": torch.ones(o.shape[0]) for la in model.layers for o in la.operators}

    def surveyed() -> list[Any]:
        found = survey(model, TOKENS.split(1), 1, [Unstructured(0.5)], fisher)
        return [(unit.name, unit.costs, unit.outliers, unit.skewness) for unit in found]

    once = surveyed()
    looks = 1 + 2  # once to see how it is called, twice to see what closes it: on a single window
    assert len(runs) == looks + 5
    monkeypatch.setattr(LayerContext, "begin_pass", lambda *_: None)
    assert once == surveyed() and len(runs) == 2 * (looks + 5) + 4 * 5  # and once for each stage
