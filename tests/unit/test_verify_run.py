"""`verify` believes nothing that a run's folder says of itself, and finds the model and the text wherever they are."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SETTINGS, TOKENS, flip
from safetensors.torch import load_file, save_file
from test_cli import folder
from torch import Tensor

import convexprune
from convexprune._api.given import name_of, name_of_text
from convexprune._recipe_file import read_recipe, write_recipe
from convexprune.adapters import BUNDLED, EMBEDDED, load
from convexprune.adapters._data import calibration
from convexprune.adapters._discovery import selection
from convexprune.errors import CalibrationError, ModelError, OutputError, RecipeError
from convexprune.recipe import make_recipe
from convexprune.report import Report, _checksum
from convexprune.validation import Verification, verify

__all__ = ["folder"]  # a fixture of test_cli

OPERATOR = "model.layers.1.mlp.up_proj"
SMALL: dict[str, Any] = {"rows": 1, "columns": 4, "bound_rows": 1, "operators": [OPERATOR]}


def _verified(run: Path, **settings: Any) -> Verification:
    asked: dict[str, Any] = {"dataset": TOKENS} | SMALL | settings
    return verify(run, **asked)


def _signed(run: Path) -> None:
    """Give the report the checksums of the files as they are now, as somebody could who wants to deceive."""
    report = Report.from_json((run / "report.json").read_text())
    report.files = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in report.files}
    (run / "report.json").write_text(report.to_json())


def _changed(run: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    for path in run.glob("*.safetensors"):
        if name in (tensors := load_file(path)):
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `model` and the run `out`."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(dense, place / "model")
    convexprune.prune(place / "model", output_dir=place / "out", **SETTINGS)
    return place


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "out", tmp_path / "copied"))


def test_the_errors_of_a_run_are_measured_again(copied: Path):
    result = _verified(copied)
    assert result.passed, result.faults
    (found,) = result.errors
    assert found.operator == OPERATOR and found.error == pytest.approx(found.reported, rel=1e-4)


def _other_values(weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).masked_fill(weight == 0, 0)


def _sparser(weight: Tensor) -> Tensor:
    return weight.masked_fill(weight.abs() < weight.abs().quantile(0.9), 0)


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "random": (_other_values, "its error is .*, not .* as reported"),
    "negated": (torch.neg, "its error is .*, not .* as reported"),
    "zeroed": (torch.zeros_like, "it has 384 zeros, and the report says 192"),
    "90 % zeros": (_sparser, "it has .* zeros, and the report says 192"),
    "dense": (lambda weight: weight + 1, "it has 0 zeros, and the report says 192"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_operator_that_is_not_what_the_run_made_is_noticed_by_checksum_and_without(copied: Path, change: str):
    spoil, message = CHANGES[change]
    _changed(copied, f"{OPERATOR}.weight", spoil)
    with pytest.raises(OutputError, match=r"model-0000.-of-.*\.safetensors is damaged, by the checksums"):
        _verified(copied)
    _signed(copied)
    result = _verified(copied)
    assert not result.passed
    assert any(re.match(f"{OPERATOR}: {message}", fault) for fault in result.faults), result.faults


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "model.layers.3.input_layernorm"])
def test_so_is_any_other_tensor(copied: Path, name: str):
    _changed(copied, f"{name}.weight", lambda tensor: tensor * 1.5)
    with pytest.raises(OutputError, match="is damaged"):
        _verified(copied)
    _signed(copied)
    assert _verified(copied).faults == [f"{name}.weight: it is not the dense model's, and no run changes it"]


@pytest.mark.parametrize(("name", "forged"), [("sparsity", 0.9), ("largest_gap", 1e-14)])
def test_so_are_totals_of_the_report(copied: Path, name: str, forged: float):
    written = json.loads((copied / "report.json").read_text()) | {name: forged}
    del written["checksum"]
    (copied / "report.json").write_text(json.dumps(written | {"checksum": _checksum(written)}))
    with pytest.raises(OutputError, match=f"its {name} is not that of its operators"):
        _verified(copied)


def test_only_measured_figures_are_shown_as_measured(copied: Path):
    *_, table = _verified(copied).tables()
    assert [column.header for column in table.columns] == [
        "operator", "relative error", "in the report", "largest weight / dense",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["report.json", "recipe.yaml", "config.json", "model.safetensors.index.json"])
def test_so_is_every_other_file(copied: Path, name: str):
    flip(copied / name)
    with pytest.raises(OutputError, match=f"{name} is damaged"):
        _verified(copied)
    (copied / name).unlink()
    with pytest.raises(OutputError, match=f"{name}.* is missing|{name}: there is no such file"):
        _verified(copied)


def test_a_report_that_names_files_outside_of_its_folder_reads_none(copied: Path):
    for name in ("../model/config.json", "/dev/zero"):
        report = Report.from_json((copied / "report.json").read_text())
        report.files = {name: "0" * 64}
        (copied / "report.json").write_text(report.to_json())
        with pytest.raises(OutputError, match=f"{name} is missing"):
            _verified(copied)


def test_an_unfinished_run_is_to_be_finished_first(dense: Path, stopped: Path):
    with pytest.raises(OutputError, match=r"is unfinished.*--resume"):
        _verified(stopped)


def test_a_run_is_verified_from_any_folder_and_after_a_move(dense: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "a").mkdir()
    shutil.copytree(dense, tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    convexprune.prune("model", output_dir="out", **SETTINGS)
    monkeypatch.chdir(tmp_path)
    assert read_recipe(tmp_path / "a" / "out").model == str(tmp_path / "a" / "model")
    assert _verified(Path("a/out")).passed
    (tmp_path / "a").rename("b")  # the run with its model
    assert _verified(Path("b/out")).passed
    (tmp_path / "b" / "out").rename("out")  # the run alone
    with pytest.raises(RecipeError, match=r"The model of this run, .*a/model, is not there.*model=.* \(--model\)"):
        _verified(Path("out"))
    assert _verified(Path("out"), model="b/model").passed


def test_another_model_than_that_of_the_run_is_named(finished: Path, tmp_path: Path):
    other = Path(shutil.copytree(finished / "model", tmp_path / "other"))
    path = sorted(other.glob("*.safetensors"))[-1]
    _changed(other, next(iter(load_file(path))), lambda weight: weight + 1)
    with pytest.raises(ModelError, match=rf"not the model that was pruned; it differs in {path.name}\. Say"):
        _verified(finished / "out", model=other)


def test_tokens_that_are_not_those_of_the_run_are_refused(finished: Path):
    with pytest.raises(RecipeError, match=r"The dataset of this run was a Tensor given by the caller\. Name"):
        verify(finished / "out", **SMALL)
    with pytest.raises(CalibrationError, match="does not give the tokens of the run"):
        _verified(finished / "out", dataset=TOKENS + 1)


def test_text_that_the_model_writes_otherwise_here_is_said(dense: Path, tmp_path: Path, monkeypatch):
    settings: dict[str, Any] = SETTINGS | {"dataset": "self", "max_seq_length": 16}
    convexprune.prune(dense, output_dir=tmp_path / "out", **settings)
    assert verify(tmp_path / "out", **SMALL).errors
    write = calibration.sampled_windows
    monkeypatch.setattr(calibration, "sampled_windows", lambda *a, **b: write(*a, **b | {"seed": 5}))
    result = verify(tmp_path / "out", **SMALL)
    assert result.passed and not result.errors and "writes another text here" in result.note


def test_a_model_that_was_loaded_is_told_by_its_tensors(finished: Path, tmp_path: Path):
    model = load(finished / "model", device="cpu").model
    model.name_or_path = ""
    convexprune.prune(model, output_dir=tmp_path / "out", **SETTINGS)
    with pytest.raises(RecipeError, match="model of this run was a LlamaForCausalLM given by the caller"):
        _verified(tmp_path / "out")
    assert _verified(tmp_path / "out", model=finished / "model").passed
    with pytest.raises(ModelError, match=r"differs in model\.layers\.0"):
        _verified(tmp_path / "out", model=finished / "out")


def test_recipes_name_what_is_bundled_or_on_the_hub_and_have_paths_in_full(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("text.txt", "c4"):
        (tmp_path / name).touch()
    assert [name_of(source) for source in (EMBEDDED, "model", "owner/name")] == [
        BUNDLED, str(tmp_path / "model"), "owner/name",
    ]  # fmt: skip
    assert [name_of_text(text) for text in ("self", "c4", "text.txt")] == ["self", "c4", str(tmp_path / "text.txt")]
    assert load(BUNDLED, device="cpu").name == BUNDLED


def test_a_recipe_comes_back_as_it_was_written(tmp_path: Path):
    recipe = make_recipe(model="a", targets=("re:x", "y"), method_args={"damping": 0.5}, method="sparsegpt", seed=3)
    write_recipe(recipe, tmp_path)
    assert read_recipe(tmp_path) == recipe


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in zip("abcdef", "bcdefg", strict=True))
RECIPES = {
    "aliases": (BOMB, "it has aliases"), "aliases inside": ("model: x\nmethod_args: {a: &a [1], b: *a}", "aliases"),
    "size": ("model: " + "x" * 300_000, "at most 262,144 are read"), "depth": ("[" * 10_000, "damaged, or no recipe"),
    "a list": ("[1, 2]", "no list of settings"), "text": ("hello", "no list of settings"), "empty": ("", "no list of"),
    "integers": ("1: 2", "no list of settings"), "a tag": ("model: !!python/object/apply:os.getcwd []", "constructor"),
    "digits": ("model: x\nseed: " + "9" * 5000, "digits"),
    "sexagesimal": ("model: x\nseed: -1" + ":59" * 9000, "seed="),
    "unknown": ("model: x\nsparsty: 1", "Unknown setting 'sparsty'. Did you mean 'sparsity'"),
    "many": ("model: x\n" + "".join(f"a{i}: 1\n" for i in range(1000)), "Unknown setting 'a0'"),
    "values": ("model: [x]\nmethod: 5\nseed: '" + "x" * 9000 + "'", "model=.*seed=.*method=5"),
    "not YAML": ("a: b: c", "damaged, or no recipe"), "no text": ("model: \0", "damaged, or no recipe"),
}  # fmt: skip


@pytest.mark.parametrize("what", RECIPES)
def test_what_is_no_recipe_is_refused_at_once(tmp_path: Path, what: str):
    text, message = RECIPES[what]
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises((RecipeError, OutputError), match=message) as told:
        read_recipe(tmp_path)
    assert len(str(told.value)) < 3000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("re:(a|b|.|.)*(.*)*.*.*.*.*.*_.*v$", "takes too long"), ("re:(((a{100}){100}){100}){100}", "too large"),
        ("re:" + "a" * 2000, "too large"), ("re:(", "not a regular expression"), ("re:" + "(" * 900, "not a regular"),
    ],
    ids=range(5),
)  # fmt: skip
def test_an_expression_that_would_not_end_is_refused(monkeypatch, pattern: str, message: str):
    monkeypatch.setattr(selection, "PATIENCE", 0.2)
    with pytest.raises(RecipeError, match=message) as told:
        for number in range(100):
            selection.matcher(pattern)(f"model.decoder.layers.{number}.self_attn.q_proj")
    assert len(str(told.value)) < 500


def test_text_of_a_run_is_read_again_where_it_lies_now(folder: Path, monkeypatch):
    settings: dict[str, Any] = {"num_calibration_samples": 4, "max_seq_length": 32, "method": "magnitude"}
    (folder / "a").mkdir()
    for name in ("model", "text.txt"):
        (folder / name).rename(folder / "a" / name)
    monkeypatch.chdir(folder / "a")
    convexprune.prune("model", dataset="text.txt", output_dir="out", bound_rows=0, **settings)
    monkeypatch.chdir(folder)
    (folder / "a").rename(folder / "b")
    asked: dict[str, Any] = SMALL | {"operators": ["model.decoder.layers.0.fc1"]}
    assert verify("b/out", **asked).passed
    text = folder / "b" / "text.txt"
    text.write_text(" ".join(reversed(text.read_text().split())))
    with pytest.raises(CalibrationError, match=r"text\.txt does not give the tokens of the run"):
        verify("b/out", **asked)
