"""Channels removed for good: the smaller model computes what the one with zeros computed, and is an ordinary folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import require_resumed
from tiny_families import FAMILIES, TOKENS, shaken
from transformers import AutoModelForCausalLM, PreTrainedModel

import convexprune
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters import _allocating as allocating
from convexprune.adapters._gradients import Fisher, loss_fisher
from convexprune.adapters._removal.base import AbstractRemoval, Cut
from convexprune.adapters._removal.narrowing import Narrowing, find_narrowing
from convexprune.adapters._saving import require_written
from convexprune.constraints import Channels, Constraint
from convexprune.errors import ModelError, OutputError, PatternError, RecipeError
from convexprune.recipe import make_recipe
from convexprune.validation import verify

WIDTHS = {  # the settings that say how many channels there are; those of most families: intermediate_size
    "deepseek_v2": {"intermediate_size": [48, 32], "moe_intermediate_size": [24, 16]},
    "falcon": {"ffn_hidden_size": [128, 88]}, "falcon, new": {"ffn_hidden_size": [128, 88]},
    "gemma3": {"text_config.intermediate_size": [48, 32]}, "llava": {"text_config.intermediate_size": [48, 32]},
    "gpt2": {"n_inner": [128, 88]}, "opt": {"ffn_dim": [48, 32]}, "opt, 350M": {"ffn_dim": [48, 32]},
    "llama4_text": {"intermediate_size": [24, 16], "intermediate_size_mlp": [48, 32]},
    "qwen3_moe": {"moe_intermediate_size": [24, 16]},
}  # fmt: skip
REFUSED = {
    "bloom": "no setting of its configuration says how many channels its MLP has (128)",
}
PATTERN = Channels(1 / 3, 8)
SMALL: dict[str, Any] = {
    "dataset": TOKENS, "num_calibration_samples": 3, "pattern": "channels:8", "sparsity": 1 / 3, "bound_rows": 0,
    "threads": 1,
}  # fmt: skip
HEADS = SMALL | {"pattern": "heads", "sparsity": 0.5}
each_kind = pytest.mark.parametrize("settings", [SMALL, HEADS], ids=["channels", "heads"])


def zero_some(model: HuggingFaceModel, found: Narrowing, pattern: Constraint) -> None:
    """Zeroes as much as is to be removed, something else in each set."""
    generator = torch.Generator().manual_seed(0)
    for one in found.sets:
        (axis,) = one.consumers
        gone = torch.randperm(one.size, generator=generator)[: one.size - pattern.width(one.size)]
        entries = torch.tensor(axis.entries(gone.tolist()))
        axis.of(model.model.get_parameter(axis.parameter)).index_fill_(axis.dim, entries, 0)


def require_same_as_zeros(model: HuggingFaceModel, found: Narrowing, pattern: Constraint) -> AbstractRemoval:
    """The smaller model, which computes what the whole one does with zeros, and counts its parameters."""
    zero_some(model, found, pattern)
    narrowed = found.narrowed(model.model.get_parameter)
    smaller = narrowed.model(model)
    torch.testing.assert_close(smaller(TOKENS).logits, model.model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    (*_, counts), own = narrowed.sizes(model).values(), sum(p.numel() for p in smaller.parameters())
    assert counts == [sum(p.numel() for p in model.model.parameters()), own]
    return narrowed


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_without_channels_computes_what_it_does_with_zeros(family: str):
    torch.manual_seed(0)
    model = HuggingFaceModel(shaken(FAMILIES[family]()))
    if family in REFUSED:
        with pytest.raises(ModelError) as refused:
            find_narrowing(model, PATTERN)
        assert REFUSED[family] in str(refused.value)
        return
    found = find_narrowing(model, PATTERN)
    found.choose(model)
    operators = {f"{layer.name}.{o.name}" for layer in model.layers for o in layer.operators}
    assert operators == {one.name for one in found.sets} == found.patterns.keys()
    narrowed = require_same_as_zeros(model, found, PATTERN)
    assert narrowed.note()["widths"] == WIDTHS.get(family, {"intermediate_size": [48, 32]})
    with pytest.raises(ModelError, match="to remove; it should be"):
        found.without({**narrowed.removed, found.sets[0].name: [0]})


@pytest.fixture
def folder(build: Callable[[str], PreTrainedModel], tmp_path: Path) -> Callable[[str], Path]:
    """Writes a tiny model."""

    def write(name: str) -> Path:
        build(name).save_pretrained(tmp_path / name, max_shard_size="60KB")
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["opt", "llama-tied", "llama-bf16"])
def test_the_result_is_an_ordinary_smaller_folder(name: str, folder: Callable[[str], Path], tmp_path: Path):
    source = folder(name)
    given: dict[str, Any] = {"dtype": "float32"} if name == "llama-bf16" else {}
    result = convexprune.prune(source, **SMALL, **given, output_dir=tmp_path / "out")
    assert result.report.environment["loading"] == "layer by layer"
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert smaller.config.intermediate_size == 32 if name != "opt" else smaller.config.ffn_dim == 32
    dense = AutoModelForCausalLM.from_pretrained(source, **given)
    note = json.loads((tmp_path / "out" / "channels.json").read_text())
    operators = {o.name: o for o in result.report.operators}
    assert note["removed"].keys() == operators.keys() and len(operators) == 2
    for operator, removed in note["removed"].items():
        kept = [j for j in range(48) if j not in removed]
        assert operators[operator].pattern == "columns 33.33333333333333%" and operators[operator].zeros == 32 * 16
        producer = operator.replace("down_proj", "up_proj").replace("fc2", "fc1")
        for kind in ("weight", "bias") if name == "opt" else ("weight",):  # those that make the channels are as before
            ours = smaller.get_parameter(f"{producer}.{kind}")
            assert torch.equal(ours, dense.get_parameter(f"{producer}.{kind}")[kept])
        with torch.no_grad():  # the dense model with the operator's new weights and zeros computes the same
            whole = dense.get_parameter(f"{operator}.weight").zero_()
            whole[:, kept] = smaller.get_parameter(f"{operator}.weight")
    torch.testing.assert_close(smaller(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)
    counts = result.report.narrowed
    assert counts is not None and counts["parameters"][1] == sum(p.numel() for p in smaller.parameters())
    assert result.report.sparsity == pytest.approx(1 / 3) and "channels.json" in result.report.files
    assert torch.equal(result.model(TOKENS).logits, smaller(TOKENS).logits)


def test_experts_whose_gate_and_up_take_turns_lose_pairs_of_rows(tmp_path: Path):
    torch.manual_seed(0)
    dense = shaken(FAMILIES["gpt_oss"]())
    dense.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    convexprune.prune(tmp_path / "dense", **SMALL, output_dir=tmp_path / "out")
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    note = json.loads((tmp_path / "out" / "channels.json").read_text())["removed"]
    assert smaller.config.intermediate_size == 32 and len(note) == 2 * 4
    with torch.no_grad():
        for name, removed in note.items():
            path, _, expert = name.rpartition(".")
            kept = [j for j in range(48) if j not in removed]
            pairs = [2 * j + i for j in kept for i in range(2)]
            up, down = path.replace("down_proj", "gate_up_proj"), path
            for part, columns in ((up, (slice(None), pairs)), (f"{up}_bias", (pairs,))):
                ours, before = (model.get_parameter(part)[int(expert)] for model in (smaller, dense))
                assert torch.equal(ours, before[columns])
            whole = dense.get_parameter(down)[int(expert)].zero_()
            whole[kept] = smaller.get_parameter(down)[int(expert)]
        torch.testing.assert_close(smaller(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "out", dataset=TOKENS).passed


@each_kind
def test_those_go_that_move_the_loss_least(
    settings: dict[str, Any], folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, found = folder("llama"), dict[str, torch.Tensor]()

    def recorded(*args: Any) -> Fisher:
        fisher = loss_fisher(*args)
        found.update({name: needs for (name, _), needs in fisher.inputs.items()})
        return fisher

    monkeypatch.setattr(allocating, "loss_fisher", recorded)
    own: dict[str, Any] = {} if settings is SMALL else {"allocation": "columns"}  # the default for channels
    result = convexprune.prune(source, **settings, **own, output_dir=tmp_path / "out")
    assert result.report.recipe["allocation"] == "columns" and len(found) == 2
    kind = settings["pattern"].partition(":")[0]
    for name, removed in json.loads((tmp_path / "out" / f"{kind}.json").read_text())["removed"].items():
        assert removed == sorted(found[name].argsort()[: len(removed)].tolist())
    told = [warning for warning in result.report.warnings if "Columns are chosen by the loss on 72 tokens" in warning]
    assert len(told) == 1
    monkeypatch.setattr(allocating, "loss_fisher", None)
    searched = convexprune.prune(source, **settings, allocation="uniform", output_dir=tmp_path / "searched")
    assert searched.report.sparsity == result.report.sparsity
    assert not any("are chosen by" in warning for warning in searched.report.warnings)


def test_what_chooses_columns_is_refused_where_there_are_none_to_choose(tmp_path: Path):
    for match, settings in {
        "'columns' chooses whole columns by how much they move the loss, and pattern": {"pattern": "unstructured"},
        "and pattern layers": {"pattern": "layers"},
        "'wanda' has scores of its own. Leave the allocation out": {"pattern": "channels", "method": "wanda"},
    }.items():
        with pytest.raises(RecipeError, match=match):
            make_recipe(model="", allocation="columns", **settings)
    for pattern, default in {
        "channels": "columns",
        "heads": "uniform",
        "columns:2": "uniform",
        "2:4": "uniform",
    }.items():
        assert make_recipe(model="", pattern=pattern).allocation == default
    assert make_recipe(model="", pattern="channels", method="osscar").allocation == "uniform"


@each_kind
def test_in_memory_the_result_is_that_of_the_folder(
    settings: dict[str, Any], folder: Callable[[str], Path], tmp_path: Path
):
    source = folder("llama")
    here = convexprune.prune(source, **settings)
    there = convexprune.prune(source, **settings, output_dir=tmp_path / "out")
    assert here.report.narrowed == there.report.narrowed
    assert (here.model.config.intermediate_size, here.model.config.num_attention_heads) in ((32, 4), (48, 2))
    written = there.model.state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in here.model.state_dict().items())


def test_a_checkpoint_that_does_not_stream_is_written_too(build: Callable[[str], PreTrainedModel], tmp_path: Path):
    source = tmp_path / "dense"
    build("llama").config.save_pretrained(source)
    torch.save(build("llama").state_dict(), source / "pytorch_model.bin")
    result = convexprune.prune(source, **SMALL, allow_pickle=True, output_dir=tmp_path / "out")
    assert result.report.environment["loading"].startswith("whole")
    assert result.model.config.intermediate_size == 32


@each_kind
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    settings: dict[str, Any], folder: Callable[[str], Path], tmp_path: Path
):
    require_resumed(folder("llama"), tmp_path, **settings)


@each_kind
def test_verify_judges_a_run(settings: dict[str, Any], folder: Callable[[str], Path], tmp_path: Path):
    convexprune.prune(folder("llama"), **settings, output_dir=tmp_path / "out")
    found = verify(tmp_path / "out", dataset=TOKENS)
    assert found.passed, found.faults
    kind = settings["pattern"].partition(":")[0]
    reader = {"channels": "down_proj", "heads": "o_proj"}[kind]
    assert {e.operator.rsplit(".", 1)[1] for e in found.errors} == {reader}
    path = tmp_path / "out" / f"{kind}.json"
    path.write_text(path.read_text().replace("[", "[1, ", 1))
    with pytest.raises(OutputError, match=rf"{kind}\.json is damaged"):
        verify(tmp_path / "out", dataset=TOKENS)


def test_what_was_written_is_compared(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A row that is not the right one has the right shape, and no zeros to count."""
    monkeypatch.setattr(Cut, "of", lambda cut, tensor: tensor.narrow(cut.dim, 0, cut.shape(tensor.shape)[cut.dim]))
    seen = list[Path]()

    def judged(model: HuggingFaceModel, place: Path, *rest: Any) -> None:
        monkeypatch.undo()
        seen.append(place)
        require_written(model, place, *rest)

    monkeypatch.setattr("convexprune.adapters.require_written", judged)
    with pytest.raises(OutputError, match="has other values than it should have"):
        convexprune.prune(folder("opt"), **SMALL, output_dir=tmp_path / "out")
    assert seen


def test_what_does_not_fit_is_refused_before_any_work(
    folder: Callable[[str], Path], build: Callable[[str], PreTrainedModel], tmp_path: Path
):
    source = folder("llama")

    def refused(error: type[Exception], match: str, **given: Any) -> None:
        with pytest.raises(error, match=match):
            convexprune.prune(given.pop("model", source), **SMALL | given, output_dir=tmp_path / "out")

    refused(PatternError, r"width of 0\. Accepted: none; with a lower multiple than 64", pattern="channels")
    refused(PatternError, r"width of 48\. Accepted: 0\.167 for a width of 40, to 0\.833 for 8", sparsity=0.01)
    refused(PatternError, r"Accepted: 0\.333 for a width of 32; with", pattern="channels:32", sparsity=0.9)
    refused(PatternError, "Leave quota out", quota="row")
    refused(RecipeError, "Leave targets and ignore out", targets=["down_proj"])
    refused(RecipeError, "all layers keep the same width", allocation="half-curve")
    refused(ModelError, "makes a smaller model, and a loaded one is pruned in place", model=build("llama"))
    with pytest.raises(RecipeError, match="inspect has no weights"):
        convexprune.inspect(source, pattern="channels:8", sparsity=0.5)
    with pytest.raises(RecipeError, match="verify the folder of the run"):
        verify(source, pattern="channels:8", sparsity=0.5)
    assert not (tmp_path / "out").exists()


def test_cuts_of_experts_and_of_a_stack_of_gate_and_up():
    tensor = torch.arange(24.0).view(2, 4, 3)
    cut = Cut(0, {0: (1, 3), 1: (0, 2)}, reads=False)
    assert torch.equal(cut.of(tensor), torch.stack([tensor[0, [0, 2]], tensor[1, [1, 3]]]))
    assert torch.equal(cut.back(-cut.of(tensor), tensor)[0, 1], tensor[0, 1]) and cut.shape((2, 4, 3)) == (2, 2, 3)
    read = Cut(1, {None: (1,)}, reads=True)
    assert torch.equal(read.back(read.of(tensor[0]), tensor[0]), tensor[0] * torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ModelError, match="not every expert"):
        Cut(0, {0: (1,)}, reads=False).shape((2, 4, 3))
