"""`--overwrite`: a run takes the place of another, whole or not at all; what no run wrote is not touched."""

from pathlib import Path
from typing import Any

import pytest
from door import SMALL
from safetensors.torch import load_file

import convexprune
from convexprune import errors
from convexprune._api import replacing
from convexprune._container.file import PACKED, SUFFIX
from convexprune._container.folder import holds_pack
from convexprune._layerwise.folder_store import FolderStore
from convexprune._runs.folder import RunFolder
from convexprune._storage import folders

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
        return "work/thesis.tex"
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


@pytest.mark.parametrize("where", [(FolderStore, "require_whole"), (RunFolder, "finish")])
def test_a_run_that_fails_leaves_the_old_one_and_can_be_resumed(
    build, done: Path, where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
):
    before = files(done)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True)
    assert files(done) == before and (done.parent / ".out.new" / "run.json").is_file()
    result = convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True, resume=True)
    assert result.report.sparsity == 0.5 and [path.name for path in done.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("pack", [False, True])
def test_a_run_killed_while_its_result_was_moved_is_overwritten_or_goes_on(
    build, done: Path, pack: bool, resume: bool, monkeypatch: pytest.MonkeyPatch
):
    expected, publish, place = files(done), folders.publish, done.parent / "killed"

    def fail(temporary: Path, path: Path) -> None:
        if path.name == "config.json":
            raise KeyboardInterrupt
        publish(temporary, path)

    given: dict[str, Any] = GIVEN | {"sparsity": 0.3, "output_dir": place}
    with monkeypatch.context() as patch:
        patch.setattr(folders, "publish", fail)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(build("llama"), **given, pack=not pack)
    assert (place / f"model{SUFFIX if pack else PACKED}").is_file()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(errors.OutputError, match=r"changed since: notes\.txt\. Only"):
        convexprune.prune(build("llama"), **given, overwrite=True)
    (place / "notes.txt").unlink()
    convexprune.prune(build("llama"), **given, pack=pack, resume=resume, overwrite=not resume)
    written = files(place)
    assert len(written) == len(expected) and holds_pack(place) is pack
    assert pack or written["model.safetensors"] == expected["model.safetensors"]


def test_a_kill_between_two_renames_loses_nothing(build, done: Path, monkeypatch: pytest.MonkeyPatch):
    before, rename = files(done), replacing.os.rename

    def fail(source: Path, target: Path) -> None:
        if source.name == ".out.new":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(replacing.os, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True)
    assert not done.exists() and files(done.parent / ".out.old") == before
    result = convexprune.prune(build("llama"), **GIVEN, output_dir=done, overwrite=True, resume=True)
    assert result.report.sparsity == 0.5 and [path.name for path in done.parent.iterdir()] == ["out"]
