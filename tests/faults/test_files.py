"""What is written appears whole, follows no link and obeys the umask; what is read is looked at in one pass."""

import errno
import hashlib
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import killed
from safetensors.torch import save_file

from convexprune._storage import files, staging
from convexprune._storage import tensors as room
from convexprune._storage.files import (
    atomic_write,
    checksums,
    copy_file,
    flush,
    locked,
    make_folder,
    overwrite,
    paths_in,
)
from convexprune._storage.staging import Staging
from convexprune._storage.tensors import DTYPES, scanned
from convexprune.errors import ModelError, OutputError


def test_a_temporary_name_cannot_be_known_and_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names, victim = set(), tmp_path / "victim"
    victim.write_text("mine")
    for _ in range(2):
        with atomic_write(tmp_path / "x") as file:
            file.write(b"new")
            names |= {path.name for path in tmp_path.glob(files.PARTS)}
    assert len(names) == 2 and (tmp_path / "x").read_bytes() == b"new"
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "planted")
    (tmp_path / ".planted.part").symlink_to(victim)
    with pytest.raises(OutputError, match="File exists"), atomic_write(tmp_path / "x") as file:
        file.write(b"lost")
    assert victim.read_text() == "mine" and (tmp_path / "x").read_bytes() == b"new"


def test_a_folder_whose_writer_was_killed_leaves_nothing_behind(tmp_path: Path):
    def write() -> None:
        with Staging(tmp_path / "x").whole() as whole:
            (whole / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(write) == -signal.SIGKILL and not (tmp_path / "x").exists()
    with Staging(tmp_path / "x").whole() as whole:
        (whole / "new").touch()
        with pytest.raises(OutputError, match="Another process works on"), Staging(tmp_path / "x").whole():
            pass
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["x", "x/new"]


@pytest.mark.parametrize(("mask", "mode"), [(0o000, 0o666), (0o022, 0o644), (0o077, 0o600)])
def test_what_is_written_obeys_the_umask(tmp_path: Path, mask: int, mode: int):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "x"), locked(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("x", "lock")} == {mode}


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run.lock").symlink_to(tmp_path / "victim")
    with (
        pytest.raises(OutputError, match=r"run\.lock cannot be written.*No link is followed"),
        locked(tmp_path / "run.lock"),
    ):
        pass
    with pytest.raises(OSError, match="symbolic links"):
        overwrite(tmp_path / "run.lock", "process 1")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(OutputError, match=r"Permission denied.* Make the folder readable and writable"),
        atomic_write(tmp_path / "x"),
    ):
        pass


def _failing(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_read_only_file_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("open", "unlink"):  # which is refused there even for a file that is not there
        monkeypatch.setattr(Path, name, _failing(errno.EROFS))
    with pytest.raises(OutputError, match=r"Read-only.* Make the file system writable"), atomic_write(tmp_path / "x"):
        pass


def test_a_disk_without_room_for_a_note_is_named_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staging, "overwrite", _failing(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"No space left.* Make room"), Staging(tmp_path / "x").whole():
        _failing(errno.ENOSPC)()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_listed_is_an_error_and_nothing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place, scandir = tmp_path / "place", os.scandir
    for path in (place / "a", place / "inside" / "b", place / "config.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    known = checksums(place)
    assert list(known) == ["a", "config.json", "inside/b"]

    def fails(path: Path) -> object:
        if Path(path).name == "inside":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    for run in (lambda: checksums(place), lambda: paths_in(place), lambda: flush(place)):
        with pytest.raises(PermissionError):
            run()


def test_a_copied_file_is_flushed_and_renamed_and_so_are_new_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[Path] = []
    monkeypatch.setattr(files, "_sync", synced.append)
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    copy_file(tmp_path / "a", tmp_path / "one" / "two" / "b")
    assert (tmp_path / "one" / "two" / "b").read_bytes() == (tmp_path / "a").read_bytes()
    temporary = next(path for path in synced if path.match(files.PARTS))
    assert set(synced) == {tmp_path, tmp_path / "one", tmp_path / "one" / "two", temporary}
    with pytest.raises(ModelError, match="gone cannot be read: No such file"):
        copy_file(tmp_path / "gone", tmp_path / "c")
    make_folder(tmp_path)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("code", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("broken", [[], [(7, math.nan)], [(0, math.inf), (129, -math.inf), (2999, math.nan)]])
def test_one_pass_finds_the_checksum_and_what_is_not_finite(tmp_path: Path, code: str, broken, monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 1024)
    tensors = {
        "beside": torch.full((5,), math.nan),
        "codes": torch.full((99,), -1, dtype=torch.int64),
        "empty": torch.zeros(0),
        "w": torch.full((3000,), torch.finfo(DTYPES[code]).max, dtype=DTYPES[code]),
    }
    for place, value in broken:
        tensors["w"][place] = value
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    if broken:
        with pytest.raises(ModelError, match=rf"w holds {len(broken)} of 3,000 values that are NaN or infinite"):
            scanned(tmp_path / "x.safetensors", {"codes", "empty", "w"})
    else:
        found = scanned(tmp_path / "x.safetensors", {"codes", "empty", "w"})
        assert found == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
