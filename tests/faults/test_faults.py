"""Faults in the middle of a run: full disks, kills at any moment, two at one folder. Nothing is lost or wrong."""

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SETTINGS, TOKENS, checksums, forked, killed, place_of

import convexprune
from convexprune import errors
from convexprune._runs import folder as output
from convexprune._storage import files
from convexprune._storage.files import locked, read_notes
from convexprune.report import Report


def _count_writes(dense: Path, folder: Path, monkeypatch) -> int:
    count, write = 0, files.write

    def counting(file, data):
        nonlocal count
        count += 1
        write(file, data)

    with monkeypatch.context() as patch:
        _patch_write(patch, counting)
        convexprune.prune(dense, output_dir=folder, **SETTINGS)
    return count


def _patch_write(patch: pytest.MonkeyPatch, write: Callable[..., None]) -> None:
    """Every module that holds `write` by name, as the `expected` run before has imported it."""
    was = files.write
    for name, module in list(sys.modules.items()):
        if name.startswith("convexprune.") and vars(module).get("write") is was:
            patch.setattr(module, "write", write)


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_when_there_is_room(dense, tmp_path, expected, monkeypatch):
    total = _count_writes(dense, tmp_path / "peace", monkeypatch)
    write = files.write
    for last in (0, 1, 2, *random.Random(0).sample(range(3, total), 5), total - 1):
        count = 0

        def filling(file, data, last=last):
            nonlocal count
            count += 1
            if count > last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(file, data)

        folder = tmp_path / f"full-{last}"
        with monkeypatch.context() as patch:
            _patch_write(patch, filling)
            with pytest.raises(errors.OutputError, match=r"No space left on device.*--resume"):
                convexprune.prune(dense, output_dir=folder, **SETTINGS)
        assert not list(place_of(folder).rglob("*.part"))
        if (folder / "config.json").exists():  # what looks like a model is a whole one
            assert checksums(folder) == expected
        convexprune.prune(dense, output_dir=folder, resume=True, **SETTINGS)
        assert checksums(folder) == expected


def _killed_at_writes(dense: Path, folder: Path, expected, monkeypatch, moments: list[int]) -> None:
    write = files.write
    for last in moments:
        count = 0

        def deadly(file, data, last=last):
            nonlocal count
            count += 1
            if count > last:
                write(file, bytes(data)[: len(bytes(data)) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, data)

        out = folder / f"killed-{last}"
        with monkeypatch.context() as patch:
            _patch_write(patch, deadly)
            assert killed(lambda out=out: convexprune.prune(dense, output_dir=out, **SETTINGS)) == -signal.SIGKILL
        convexprune.prune(dense, output_dir=out, resume=True, **SETTINGS)
        assert checksums(out) == expected
        assert {path.name for path in out.iterdir()} == {path.name for path in dense.iterdir()} | {
            "recipe.yaml",
            "report.json",
            "README.md",
            "report.html",
        }


def test_killed_in_the_middle_of_any_write(dense, tmp_path, expected, monkeypatch):
    total = _count_writes(dense, tmp_path / "peace", monkeypatch)
    _killed_at_writes(dense, tmp_path, expected, monkeypatch, [0, *random.Random(1).sample(range(1, total), 5)])


@pytest.mark.slow
def test_killed_in_the_middle_of_every_write(dense, tmp_path, expected, monkeypatch):
    total = _count_writes(dense, tmp_path / "peace", monkeypatch)
    _killed_at_writes(dense, tmp_path, expected, monkeypatch, list(range(total)))


@pytest.mark.long
def test_killed_at_random_moments(dense: Path, tmp_path: Path, expected: dict[str, str]):
    began = time.monotonic()
    assert killed(lambda: convexprune.prune(dense, output_dir=tmp_path / "peace", **SETTINGS)) == 0
    duration = time.monotonic() - began
    for number in range(4):
        out, after = tmp_path / f"killed-{number}", random.Random(number).uniform(0, duration)
        killed(lambda out=out: convexprune.prune(dense, output_dir=out, **SETTINGS), after)
        convexprune.prune(dense, output_dir=out, resume=True, **SETTINGS)
        assert checksums(out) == expected


def test_killed_again_and_again_it_still_gets_there(dense: Path, tmp_path: Path, expected, monkeypatch):
    """Each life survives 55 writes only; none of them begins from the start."""
    write, out, lives = files.write, tmp_path / "out", 0
    count = 0

    def deadly(file, data):
        nonlocal count
        count += 1
        if count > 55:
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, data)

    with monkeypatch.context() as patch:
        _patch_write(patch, deadly)
        while killed(lambda: convexprune.prune(dense, output_dir=out, resume=True, **SETTINGS)) != 0:
            lives += 1
            assert lives < 10
    assert lives > 1 and checksums(out) == expected


def test_two_processes_on_one_folder_are_one_too_many(dense: Path, stopped: Path, expected):
    with (
        locked(place_of(stopped) / "lock") as mine,
        pytest.raises(errors.OutputError, match=r"Another process works on"),
    ):
        assert mine
        convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    assert checksums(stopped) == expected


def test_a_rank_that_comes_while_another_tidies_up_takes_the_run_as_finished(
    dense: Path, tmp_path: Path, expected, monkeypatch
):
    out = tmp_path / "out"
    convexprune.prune(dense, output_dir=out, **SETTINGS)
    with output.RunFolder(out).staging.held() as tidying:
        assert tidying
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert convexprune.prune(dense, output_dir=out, executor="ranks", **SETTINGS).report.operators
    assert checksums(out) == expected


def test_a_rank_that_opens_a_run_while_another_finishes_it_takes_it_as_finished(tmp_path: Path, monkeypatch):
    folder, tokens = output.RunFolder(tmp_path / "out"), {"calibration": TOKENS}
    with folder.opened({"a": 1}, tokens, 0):
        report = Report({}, {}, {}, identity={"a": 1})

    def finishing(path: Path):
        if path.name == output.RUN and folder.is_unfinished:
            folder.staging.begin()
            folder.finish(report)
        return read_notes(path)

    monkeypatch.setattr(output, "read_notes", finishing)
    with folder.opened({"a": 1}, tokens, 1):
        assert folder.is_finished
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_child_of_a_test_never_goes_on_as_a_test_worker():
    """A signal's handler may raise in a child before any of its own code runs."""
    child = os.fork()
    if child == 0:
        raise KeyboardInterrupt
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_lock_goes_with_its_process(tmp_path: Path):
    def hold() -> None:
        with locked(tmp_path / "lock") as mine:
            (tmp_path / "held").write_text(str(mine))
            time.sleep(60)

    child = forked(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with locked(tmp_path / "lock") as mine:
        assert not mine
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "lock") as mine:
        assert mine
