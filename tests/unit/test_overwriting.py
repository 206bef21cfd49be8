"""`--overwrite`: a run takes the place of another, whole or not at all; what no run wrote is not touched."""

from pathlib import Path
from typing import Any

import pytest
from door import SMALL
from runs import place_of
from safetensors.torch import load_file

import convexprune
from convexprune import errors
from convexprune._layerwise.folder_store import FolderStore
from convexprune._runs.folder import RunFolder
from convexprune._storage import files as files_module
from convexprune._storage import staging

GIVEN: dict[str, Any] = SMALL | {"method": "magnitude"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def done(build, tmp_path: Path) -> Path:
    """A finished run, which others are to replace."""
    convexprune.prune(build("llama"), **GIVEN, sparsity=0.3, output_dir=tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("pack", [False, True])
def test_a_run_takes_the_place_of_another(build, done: Path, pack: bool):
    convexprune.prune(build("llama"), **GIVEN, sparsity=0.4, output_dir=done, overwrite=True, pack=pack)
    result = convexprune.prune(build("llama"), **GIVEN, sparsity=0.5, output_dir=done, overwrite=True)
    assert result.output_dir == done and result.report.sparsity == 0.5
    assert result.report.environment["folder"] == str(done)
    weight = load_file(done / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert (weight == 0).sum().item() == weight.numel() // 2
    assert [path.name for path in done.parent.iterdir()] == ["out"]  # nothing is left beside it


@pytest.mark.parametrize("pack", [False, True])
def test_a_finished_run_is_handed_back_by_the_command_that_has_made_it(build, tmp_path: Path, pack: bool):
    out, again = tmp_path / "out", {"output_dir": tmp_path / "out", "overwrite": True, "resume": True}
    convexprune.prune(build("llama"), **GIVEN, **again, pack=pack)
    before = files(out)  # with the times in its report
    convexprune.prune(build("llama"), **GIVEN, **again, pack=pack)
    assert files(out) == before
    for changed in ({"pack": not pack}, {"sparsity": 0.3}, {"evaluation": "self"}):
        convexprune.prune(build("llama"), **GIVEN | changed, **again)
        assert files(out) != before
        before = files(out)


def test_where_nothing_is_overwriting_is_an_ordinary_run(build, tmp_path: Path):
    convexprune.prune(build("llama"), **GIVEN, output_dir=tmp_path / "deep" / "out", overwrite=True)
    assert (tmp_path / "deep" / "out" / "report.json").is_file()
    with pytest.raises(errors.RecipeError, match="Give output_dir, or leave overwrite out"):
        convexprune.prune(build("llama"), **GIVEN, overwrite=True)


def test_ranks_do_not_replace_a_folder(build, done: Path):
    with pytest.raises(errors.RecipeError, match="one process replaces a folder"):
        convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True, executor="ranks")


def test_the_error_of_a_folder_in_use_names_the_way_out(build, done: Path):
    with pytest.raises(errors.OutputError, match=r"or overwrite=True \(--overwrite\)"):
        convexprune.prune(build("llama"), **GIVEN, output_dir=done)


def spoil(folder: Path, how: str) -> str:
    if how == "a file of the user":
        (folder / "notes.txt").write_text("mine")
        return "notes.txt"
    if how == "a folder of the user":
        (folder / "work").mkdir()
        (folder / "work" / "thesis.tex").write_text("mine")
        return "work, work/thesis.tex"
    name = "config.json" if how == "a file that the user changed" else "README.md"
    (folder / name).write_text("{}")
    return name


@pytest.mark.parametrize(
    "how", ["a file of the user", "a folder of the user", "a file that the user changed", "a card"]
)
def test_what_no_run_wrote_is_not_touched(build, done: Path, how: str):
    name = spoil(done, how)
    before = files(done)
    with pytest.raises(errors.OutputError, match=f"holds what no run wrote, or what was changed since: {name}"):
        convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True)
    assert files(done) == before


def test_a_folder_that_is_no_run_is_not_touched(build, tmp_path: Path):
    (tmp_path / "out" / "work").mkdir(parents=True)
    with pytest.raises(errors.OutputError, match="holds what no run wrote, or what was changed since: work"):
        convexprune.prune(build("llama"), **GIVEN, output_dir=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "work").is_dir()


@pytest.mark.parametrize("wrong", [{"targets": ["nothing"]}, {"num_calibration_samples": 9999}, {"model": "nowhere"}])
def test_an_unfinished_run_is_dropped_only_by_a_run_that_begins(
    build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(build("llama"), **GIVEN, output_dir=out)
    before = files(place_of(out))
    with pytest.raises(errors.ConvexpruneError):
        convexprune.prune(**{"model": build("llama"), **GIVEN, **wrong}, output_dir=out, overwrite=True)
    assert files(place_of(out)) == before


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_copies_replace_copies_of_the_same_run_alone(build, tmp_path: Path, option: str):
    out, logs = tmp_path / "out", tmp_path / "logs"
    given: dict[str, Any] = {**GIVEN, "output_dir": out, "report_dir": logs}
    again: dict[str, Any] = {**given, option: True}
    convexprune.prune(build("llama"), **given)
    convexprune.prune(build("llama"), **again)
    assert (logs / "report.json").read_bytes() == (out / "report.json").read_bytes()
    for name in ("recipe.yaml", "report.json"):  # of another run, or written by hand
        theirs = tmp_path / name.partition(".")[0]
        theirs.mkdir()
        (theirs / name).write_bytes((out / name).read_bytes() + b"\n")
        before, there = files(theirs), dict[str, Any](again, report_dir=theirs)
        with pytest.raises(errors.OutputError, match=rf"already holds {name}\. Give another report_dir"):
            convexprune.prune(build("llama"), **there)
        assert files(theirs) == before


def test_copies_do_not_go_inside_of_the_result(build, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(errors.OutputError, match="inside of the result's folder"):
        convexprune.prune(build("llama"), **GIVEN, output_dir=out, report_dir=out / "logs")
    assert not out.exists()


def test_copies_of_a_report_do_not_go_into_the_folder_of_a_model(build, done: Path, tmp_path: Path):
    before = files(done)
    with pytest.raises(errors.OutputError, match=r"holds a model.*report_dir \(--save\)"):
        convexprune.prune(build("llama"), **GIVEN, output_dir=tmp_path / "new", report_dir=done, overwrite=True)
    assert files(done) == before


@pytest.mark.parametrize("where", [(FolderStore, "require_whole"), (RunFolder, "finish")])
def test_a_run_that_fails_leaves_the_old_one_and_can_be_resumed(
    build, done: Path, where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
):
    before = files(done)
    with monkeypatch.context() as patch:
        patch.setattr(*where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True)
    assert files(done) == before and (place_of(done) / "run.json").is_file()
    handed_back = convexprune.prune(build("llama"), **GIVEN, sparsity=0.3, output_dir=done, resume=True)
    assert handed_back.report.sparsity == pytest.approx(0.3, abs=0.01) and (place_of(done) / "run.json").is_file()
    result = convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True, resume=True)
    assert result.report.sparsity == 0.5 and [path.name for path in done.parent.iterdir()] == ["out"]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def stop_at(name: str, patch: pytest.MonkeyPatch) -> None:
    """Interrupt the rename that would give a folder this name."""

    def publish(temporary: Path, path: Path) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        files_module.publish(temporary, path)

    patch.setattr(staging, "publish", publish)


@pytest.mark.parametrize("name", ["out", "old"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_stop_between_two_renames_loses_nothing(
    build, done: Path, name: str, resume: bool, monkeypatch: pytest.MonkeyPatch
):
    before = files(done)
    with monkeypatch.context() as patch:
        stop_at(name, patch)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True)
    assert files(done if name == "old" else place_of(done) / "old") == before
    result = convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True, resume=resume)
    assert result.report.sparsity == 0.5 and [path.name for path in done.parent.iterdir()] == ["out"]


def test_the_old_result_comes_back_if_the_new_one_does_not_replace_it(
    build, done: Path, monkeypatch: pytest.MonkeyPatch
):
    before = files(done)
    with monkeypatch.context() as patch:
        stop_at("out", patch)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True)
    with pytest.raises(errors.OutputError, match=r"differs in recipe\.sparsity"):
        convexprune.prune(build("llama"), **GIVEN, output_dir=done, resume=True)
    assert files(done) == before


def test_a_folder_that_the_user_made_meanwhile_is_not_touched(build, done: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_at("out", patch)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True)
    done.mkdir()
    (done / "notes.txt").write_text("mine")
    kept = files(place_of(done) / "old")
    for resume in (True, False):
        with pytest.raises(errors.OutputError, match="holds what no run wrote"):
            convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True, resume=resume)
    assert files(done) == {"notes.txt": b"mine"} and files(place_of(done) / "old") == kept


def test_a_file_that_comes_while_the_run_is_on_keeps_the_old_result(build, done: Path, monkeypatch: pytest.MonkeyPatch):
    finish = RunFolder.finish

    def late(self: RunFolder, report: Any) -> None:
        (done / "notes.txt").write_text("mine")
        finish(self, report)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", late)
        with pytest.raises(errors.OutputError, match="holds what no run wrote"):
            convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True)
    assert (done / "notes.txt").read_text() == "mine" and (done / "report.json").is_file()
    (done / "notes.txt").unlink()
    result = convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True, resume=True)
    assert result.report.sparsity == 0.5


def test_a_run_that_replaces_another_through_a_link_keeps_the_link(build, done: Path, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    done.rename(tmp_path / "disk" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for _ in range(2):
        convexprune.prune(build("llama"), **GIVEN, output_dir=tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").readlink() == tmp_path / "disk" / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    assert not place_of(tmp_path / "disk" / "out").exists()
