"""Runs in a folder: what is finished is kept, what changed or is damaged is found, and the bits are always the same."""

import pkgutil
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LAYERS, SETTINGS, TOKENS, checksums, cut, empty, flip, place_of, stop_after
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import convexprune
from convexprune import adapters, errors
from convexprune._api import request
from convexprune._device import machine
from convexprune._layerwise import pipeline
from convexprune._layerwise.folder_store import FolderStore
from convexprune._runs import executors
from convexprune._runs.folder import RunFolder, differences


def test_a_finished_folder_is_an_ordinary_one(dense: Path, tmp_path: Path):
    result = convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    names = {path.name for path in dense.iterdir()} | {"recipe.yaml", "report.json", "README.md", "report.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result.report.environment["loading"] == "layer by layer"
    for o in result.report.operators:
        module = loaded.get_submodule(o.name)
        assert isinstance(module, nn.Linear) and int((module.weight == 0).sum()) == o.zeros == o.expected_zeros
    assert result.model is result.model


def test_an_unfinished_run_is_never_overwritten_and_goes_on_when_asked(dense, stopped, expected, monkeypatch):
    with pytest.raises(errors.OutputError, match=r"unfinished run, 2 of its layers finished.*--resume"):
        convexprune.prune(dense, output_dir=stopped, **SETTINGS)
    pruned, events = [], []
    call = pipeline.Pipeline.__call__
    monkeypatch.setattr(pipeline.Pipeline, "__call__", lambda s, c: (pruned.append(c.layer.name), call(s, c)))
    result = convexprune.prune(dense, output_dir=stopped, resume=True, on_progress=events.append, **SETTINGS)
    assert set(pruned) == {"model.layers.2", "model.layers.3"}  # what was finished is not redone
    assert [event.report for event in events if event.report is not None] == result.report.operators
    assert {(event.total, event.earlier) for event in events if event.phase == "pruning"} == {(7 * LAYERS, 7 * 2)}
    earlier = sum(operator.seconds for operator in result.report.operators[: 7 * 2])
    assert result.report.seconds["solves of earlier calls"] == pytest.approx(earlier)
    assert checksums(stopped) == expected


def test_a_finished_run_is_handed_back(dense: Path, tmp_path: Path):
    first = convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    with pytest.raises(errors.OutputError, match="a finished run"):
        convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    again = convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert again.report == first.report
    with pytest.raises(errors.OutputError, match=r"recipe\.sparsity: null then, 0\.3 now"):
        convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, sparsity=0.3, **SETTINGS)


def test_a_result_that_was_saved_from_memory_is_no_run_to_go_on_with(dense: Path, tmp_path: Path):
    convexprune.prune(dense, **SETTINGS).save(tmp_path / "out")
    with pytest.raises(errors.OutputError, match="saved from memory: there is no run to go on with"):
        convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, **SETTINGS)


@pytest.mark.long
def test_the_text_to_evaluate_on_may_change_while_a_run_is_interrupted(dense: Path, tmp_path: Path):
    settings: dict[str, Any] = SETTINGS | {"dataset": "self", "max_seq_length": 16}
    whole = convexprune.prune(dense, output_dir=tmp_path / "whole", evaluation="self", **settings)
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, output_dir=tmp_path / "out", evaluation=TOKENS, on_progress=stop_after(1), **settings)
    place_of(tmp_path / "out").rename(tmp_path / "stopped")
    for evaluation, expected in (("self", whole.report.perplexity), (None, {})):
        shutil.copytree(tmp_path / "stopped", place_of(tmp_path / "out"))
        found = convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, evaluation=evaluation, **settings)
        assert found.report.perplexity == expected and found.report.recipe["evaluation"] == evaluation
        assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_layers_that_are_not_there_at_the_end_are_named(tmp_path: Path):
    with pytest.raises(errors.OutputError, match=r"layers \[0, 1\]"):
        FolderStore(tmp_path, 2, "cpu").require_whole()


def test_what_the_first_process_has_made_is_what_all_agree_on(tmp_path: Path):
    assert [FolderStore(tmp_path, 1).compute_once("name", lambda value=value: value) for value in (1, 2)] == [1, 1]


def test_one_named_gpu_is_one_worker():
    assert machine.default_workers("cuda:1", None) == 1


def test_what_was_streamed_is_read_as_it_was_opened(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = list[bool]()
    for room, name in ((request, "load"), (adapters, "load_packed")):
        real = getattr(room, name)

        def heard(*a: Any, real: Callable[..., Any] = real, **b: Any) -> Any:
            asked.append(b["trust_remote_code"])
            return real(*a, **b)

        monkeypatch.setattr(room, name, heard)
    result = convexprune.prune(dense, output_dir=tmp_path / "out", trust_remote_code=True, **SETTINGS)
    assert result.model is not None and asked == [True, True]


@pytest.mark.parametrize("where", ["pathlib.Path.is_file", "os.path.lexists"])
def test_a_rank_may_begin_a_folder_while_another_looks_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    out, real, looks = tmp_path / "out", pkgutil.resolve_name(where), list[Path]()

    def look(path: Path) -> bool:
        found = real(path)
        if path.is_relative_to(place_of(out)) and not looks:
            looks.append(path)
            RunFolder(out).staging._claim()
        return found

    monkeypatch.setattr(where, look)
    RunFolder(out).check(resume=True)
    assert looks and RunFolder(out).staging.is_ours


def _other_model(dense: Path, folder: Path) -> Path:
    shutil.copytree(dense, folder)
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return folder


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "sparsity": ({"sparsity": 0.6}, r"recipe\.sparsity: null then, 0\.6 now"),
    "method": ({"method": "wanda"}, r'recipe\.method: "sparsegpt" then, "wanda" now'),
    "tokens": ({"dataset": TOKENS + 1}, r"tokens\.calibration"),
    "dtype": ({"dtype": "bfloat16"}, r'numerics\.dtype: "float32" then, "bfloat16" now'),
    "threads": ({"threads": 2}, r"numerics\.threads: 1 then, 2 now"),
    "weights": ({}, r"weights\.model-\d+-of-\d+\.safetensors"),
    "code": ({}, r"code\. "),
    "processor": ({}, r'numerics\.steps: "(bfloat16|float32)" then, "(bfloat16|float32)" now'),
    "instructions": ({}, r'numerics\.instructions: "[A-Z0-9]+" then, "another" now'),
    "gpu": ({}, r'numerics\.gpu: null then, "another" now'),
    "switch": ({}, r'numerics\.mkldnn\.enabled: null then, "False" now'),
    "variable": ({}, r'numerics\.ONEDNN_MAX_CPU_ISA: (null|".*") then, "AVX" now'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named_and_refused(dense, stopped, expected, tmp_path, monkeypatch, change: str):
    settings, message = CHANGES[change]
    model = _other_model(dense, tmp_path / "other") if change == "weights" else dense
    with monkeypatch.context() as patch:
        if change == "code":
            patch.setattr(machine, "_own_code", lambda: "another")
        if change == "processor":
            here = machine.has_bfloat16(torch.device("cpu"))
            patch.setattr(machine, "has_bfloat16", lambda device: not here)
        if change in ("instructions", "gpu"):
            here = machine.installation("cpu") | {change: "another"}
            patch.setattr(request, "installation", lambda device: here)
        if change == "switch":
            patch.setattr(torch.backends.mkldnn, "enabled", False)
        if change == "variable":
            patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX")  # CI runs these tests under SSE41
        with pytest.raises(errors.OutputError, match=f"holds another run; it differs in.*{message}") as refused:
            convexprune.prune(model, output_dir=stopped, resume=True, **SETTINGS | settings)
        assert not re.search("[0-9a-f]{16}", str(refused.value))  # names, no checksums
    convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    assert checksums(stopped) == expected


def _lie(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"zeros": ', b'"zeros": 1'))


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize(
    "file", ["layers/00000.safetensors", "layers/00001.json", "hidden/00002.dense.bin", "hidden/*"]
)
def test_damaged_files_are_found_and_done_again(dense: Path, stopped: Path, expected, file: str, damage):
    paths = sorted((place_of(stopped) / "work").glob(file))
    assert paths
    for path in paths:
        damage(path)
    convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    assert checksums(stopped) == expected


def test_a_disk_that_does_not_keep_what_it_is_given_is_found(dense: Path, tmp_path: Path, monkeypatch):
    run = executors.Serial.run

    def damaged(self, job, *rest):
        run(self, job, *rest)
        flip(job.folder / "layers" / "00001.safetensors")

    monkeypatch.setattr(executors.Serial, "run", damaged)
    with pytest.raises(errors.OutputError, match=r"does not hold what was written to it \(layers \[1\]\)"):
        convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_report_that_is_not_what_was_written_is_done_again(dense: Path, stopped: Path):
    _lie(place_of(stopped) / "work" / "layers" / "00001.json")
    result = convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    assert all(o.zeros == o.expected_zeros for o in result.report.operators)


def test_a_loaded_model_with_other_settings_or_another_tokenizer_is_another_run(
    build: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    tokenizer = deepcopy(tokenizer)  # the other tests have the same
    settings: dict[str, Any] = SETTINGS | {"output_dir": tmp_path / "out", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(build("llama"), tokenizer=tokenizer, on_progress=stop_after(1), **settings)
    other = build("llama")
    assert other.generation_config is not None
    other.generation_config.max_new_tokens = 7
    with pytest.raises(errors.OutputError, match=r"it differs in.*weights.generation settings"):
        convexprune.prune(other, tokenizer=tokenizer, **settings)
    other = build("llama")
    other.config.rms_norm_eps = 1e-5
    with pytest.raises(errors.OutputError, match=r"it differs in.*weights.configuration"):
        convexprune.prune(other, tokenizer=tokenizer, **settings)
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages }}"
    with pytest.raises(errors.OutputError, match=r"it differs in.*weights.tokenizer"):
        convexprune.prune(build("llama"), tokenizer=tokenizer, **settings)
    tokenizer.chat_template = template
    tokenizer("some text", truncation=True, max_length=2)  # which is no setting of the tokenizer
    assert convexprune.prune(build("llama"), tokenizer=tokenizer, **settings).report.sparsity == 0.5


def test_another_folder_is_left_alone_even_when_resuming(dense: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("x")
    with pytest.raises(errors.OutputError, match="already holds something"):
        convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


def test_a_loaded_model_is_resumed_too_and_given_back_pruned(dense: Path, tmp_path: Path):
    def fresh():
        return AutoModelForCausalLM.from_pretrained(dense)

    whole = convexprune.prune(fresh(), output_dir=tmp_path / "peace", **SETTINGS)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(fresh(), output_dir=out, on_progress=stop_after(2), **SETTINGS)
    flip(place_of(out) / "work" / "hidden" / "00002.dense.bin")
    model = fresh()
    result = convexprune.prune(model, output_dir=out, resume=True, **SETTINGS)
    assert result.model is model
    assert checksums(out) == checksums(tmp_path / "peace")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name])
    assert result.report.environment["loading"] == "whole: it was given loaded"
    other = fresh()
    convexprune.prune(other, output_dir=out, resume=True, **SETTINGS)  # it is finished, and the model is still dense
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("file", ["hidden/00002.pruned.bin", "hidden/*", "layers/00001.safetensors"])
def test_a_pruned_prefix_is_resumed_bit_for_bit(dense: Path, tmp_path: Path, file: str):
    settings: dict[str, Any] = SETTINGS | {"prefix": "pruned"}
    convexprune.prune(dense, output_dir=tmp_path / "peace", **settings)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, output_dir=out, on_progress=stop_after(2), **settings)
    for path in sorted((place_of(out) / "work").glob(file)):
        flip(path)
    convexprune.prune(dense, output_dir=out, resume=True, **settings)
    assert checksums(out) == checksums(tmp_path / "peace")


def test_text_that_the_model_samples_is_not_sampled_again(tmp_path: Path, monkeypatch):
    settings: dict[str, Any] = {
        "method": "magnitude", "num_calibration_samples": 2, "max_seq_length": 16, "evaluation": "self", "threads": 1,
    }  # fmt: skip
    monkeypatch.setattr("convexprune._api.given.EVALUATION_SAMPLES", 1)
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(output_dir=tmp_path / "out", on_progress=stop_after(1), **settings)
    sampler = "convexprune.adapters._data.calibration.sampled_windows"
    monkeypatch.setattr(sampler, lambda *_, **__: pytest.fail("sampled"))
    result = convexprune.prune(output_dir=tmp_path / "out", resume=True, **settings)
    assert set(result.report.perplexity) == {"dense", "pruned"}
    assert result.report.environment["loading"] == "layer by layer"


def test_differences_are_named_by_their_place():
    then, now = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "e": None, "d": [1, 2]}
    assert differences(then, now) == ["a.c: 2 then, 3 now", "d: [1] then, [1, 2] now"]
    then, now = {"a": "0" * 64, "b": "1" * 64}, {"a": "2" * 64, "c": "3" * 64}
    assert differences(then, now) == ["a", "b (missing now)", "c (new)"]
