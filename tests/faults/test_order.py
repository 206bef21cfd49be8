"""What can be known from names, paths and headers is found before any work, and leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import convexprune
from convexprune import _cli as cli
from convexprune import errors
from convexprune._storage.staging import output_folder
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._data import calibration
from convexprune.validation import compare, verify

NOWHERE = Path("nowhere")  # no model is looked for before these checks


def compared(model: Path = NOWHERE, **settings: Any) -> None:
    plain = {"methods": ["wanda"], "sparsities": [0.5], "patterns": ["unstructured"], "conventions": ["own"]}
    compare(model, **{**plain, "output": NOWHERE, **settings})


def evaluated(**settings: Any) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    result = CliRunner().invoke(cli.app, ["eval", str(NOWHERE), *options])
    assert result.exception is not None
    raise result.exception


@pytest.fixture
def folder(tiny_opt: HuggingFaceModel, tmp_path: Path) -> Path:
    tiny_opt.model.save_pretrained(tmp_path)
    assert tiny_opt.tokenizer is not None
    tiny_opt.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("door", "settings"),
    [
        (lambda **s: convexprune.prune(NOWHERE, **s), {"dataset": "nosuch.txt"}),
        (lambda **s: convexprune.prune(NOWHERE, **s), {"evaluation": "nosuch.txt"}),
        (lambda **s: convexprune.prune(NOWHERE, **s), {"evaluation": Path("nosuch.jsonl")}),
        (lambda **s: convexprune.permute(NOWHERE, **s), {"dataset": "nosuch.txt"}),
        (lambda **s: verify(NOWHERE, **s), {"dataset": "nosuch.txt"}),
        (compared, {"dataset": "nosuch.txt"}),
        (compared, {"eval_texts": ["nosuch.txt"]}),
        (evaluated, {"text": "nosuch.txt"}),
    ],
)
def test_a_text_that_is_not_there_is_named_before_the_model_is_looked_for(
    door: Callable[..., None], settings: dict[str, Any]
):
    with pytest.raises(errors.CalibrationError, match=r"nosuch.*No such file"):
        door(**settings)


def test_what_is_no_text_is_refused_and_a_folder_is_none(tmp_path: Path):
    (tmp_path / "folder.txt").mkdir()
    for evaluation, said in ((5, "evaluation is of type int"), (tmp_path / "folder.txt", "Is a directory")):
        with pytest.raises(errors.CalibrationError, match=said):
            convexprune.prune(NOWHERE, evaluation=evaluation)  # pyright: ignore[reportArgumentType]
    with pytest.raises(errors.CalibrationError, match=r"Unknown data set 'C4'\. Did you mean 'c4'"):
        convexprune.prune(NOWHERE, dataset="C4")


def test_eval_counts_from_one():
    for settings in ({"max_windows": -1}, {"window": 1}):
        with pytest.raises(errors.RecipeError, match="greater than or equal"):
            evaluated(text="nosuch.txt", **settings)


@pytest.mark.parametrize("door", ["prune", "compare"])
def test_a_text_that_is_too_short_is_named_before_the_model_writes_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, door: str
):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model wrote text")

    monkeypatch.setattr(calibration, "sampled_windows", fail)
    (folder / "short.txt").write_text("It was.")
    with pytest.raises(errors.CalibrationError, match=r"evaluation, .*short.* 0 full windows of 32 tokens"):
        if door == "prune":
            convexprune.prune(
                folder, evaluation=folder / "short.txt", max_seq_length=32, output_dir=folder.with_name("out")
            )
        else:
            texts = [str(folder / "short.txt")]
            compared(folder, eval_texts=texts, eval_window=32, output=folder.with_name("out"), plots=False)
    assert not folder.with_name("out").exists()


@pytest.mark.parametrize(
    "door",
    [
        lambda model, out: convexprune.prune(model, output_dir=out),
        lambda model, out: convexprune.permute(model, output_dir=out),
        lambda model, out: compared(model, output=out),
    ],
)
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("model/pruned", "inside of the model's own folder"),
        ("text.txt/out", "text.txt is a file"),
        ("text.txt", "is a"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    tmp_path: Path, door: Callable[[Path, Path], None], place: str, said: str
):
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(errors.OutputError, match=said):
        door(tmp_path / "model", tmp_path / place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "text.txt"]


def test_where_nothing_can_be_written_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(**_: object) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("convexprune._storage.staging.mkdtemp", full)
    with pytest.raises(errors.OutputError, match="Read-only file system"):
        convexprune.prune(NOWHERE, output_dir=tmp_path / "out")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder("~/out") == tmp_path / "out"
    with pytest.raises(errors.OutputError, match="without '~'"):
        output_folder("~nobody-of-this-name/out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_path_is_refused():
    with pytest.raises(errors.OutputError, match="5 is no path"):
        output_folder(5)  # pyright: ignore[reportArgumentType]


def test_permute_refuses_a_width_that_the_pattern_does_not_fit(tiny_opt: HuggingFaceModel):
    with pytest.raises(errors.PatternError, match=r"q_proj: .*no multiple of 7"):
        convexprune.permute(tiny_opt.model, pattern="3:7", dataset=torch.zeros(16, 8, dtype=torch.int64))
