"""Nothing of the user's is changed, whatever lies around an output: files, folders and links, of any name and anywhere.

Each command either makes its output and changes nothing else, or is refused and leaves everything as it was.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from runs import SETTINGS
from tiny_models import TINY
from typer.testing import CliRunner

import convexprune
from convexprune import _cli as cli
from convexprune._storage.files import write_notes
from convexprune._storage.staging import MARKER, Staging
from convexprune.errors import ConvexpruneError, OutputError

QUICK: dict[str, Any] = SETTINGS | {"method": "magnitude"}
QUANTIZED: dict[str, Any] = SETTINGS | {"sparsity": 0, "quantize": "int4", "group_size": -1}
COMPARED: dict[str, Any] = {
    "methods": ["magnitude"], "conventions": ["own"], "eval_texts": ["licences"], "eval_window": 16, "eval_windows": 1,
    "plots": False, "dataset": SETTINGS["dataset"], "num_calibration_samples": 2, "held_out_samples": 1,
}  # fmt: skip
OWN = ["work", "new", "old", "lock", MARKER, "run.json", "run.lock", "report.json", "config.json", "recipe.yaml"]
USERS = ["notes.txt", ".backup.part", ".0123456789abcdef.part", "thesis", "model.safetensors"]
BESIDE = [".out.part", ".out.new", ".out.old", "work", "run.lock", "neighbour", ".0123456789abcdef.part"]
KINDS = ["file", "folder", "full", "link to a file", "link to a folder", "link to nothing", "marked"]


def put(path: Path, kind: str, elsewhere: Path) -> None:
    """Make a thing of the user's; `elsewhere` has the targets of links."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    match kind:
        case "file":
            path.write_text("mine")
        case "folder":
            path.mkdir()
        case "full" | "marked":
            path.mkdir()
            (path / "out").mkdir()
            (path / "out" / "thesis.tex").write_text("mine")
            if kind == "marked":  # as this program would for another output
                write_notes(path / MARKER, {"output": "another", "resumed_by": ""})
        case _:
            path.symlink_to(elsewhere / kind.removeprefix("link to a ").removeprefix("link to "))


def seen(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All that is below a folder: kinds, contents, targets and permissions."""
    found = {}
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[path.relative_to(folder).as_posix()] = (path.lstat().st_mode, content)
    return found


@pytest.fixture(scope="module")
def sources(dense: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read: a model, one with a tokenizer, a run, one that is quantized, and a pack."""
    folder = tmp_path_factory.mktemp("sources")
    TINY["llama"]().save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    shutil.copytree(dense, folder / "dense")
    convexprune.prune(dense, output_dir=folder / "run", **QUICK)
    convexprune.prune(dense, output_dir=folder / "int4", **QUANTIZED)
    convexprune.pack(folder / "run", folder / "pack")
    return folder


def _command(*words: str | Path) -> None:
    found = CliRunner().invoke(cli.app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "prune": lambda s, out: convexprune.prune(s / "dense", output_dir=out, **QUICK),
    "prune, resumed": lambda s, out: convexprune.prune(s / "dense", output_dir=out, resume=True, **QUICK),
    "prune, overwriting": lambda s, out: convexprune.prune(s / "dense", output_dir=out, overwrite=True, **QUICK),
    "prune, packing": lambda s, out: convexprune.prune(
        s / "dense", output_dir=out, overwrite=True, resume=True, pack=True, **QUICK
    ),
    "pack": lambda s, out: convexprune.pack(s / "run", out),
    "unpack": lambda s, out: convexprune.unpack(s / "pack", out),
    "export": lambda s, out: convexprune.export(s / "int4", out),
    "export, gguf": lambda s, out: convexprune.export(s / "text", out, "gguf"),
    "permute": lambda s, out: convexprune.permute(
        s / "dense", output_dir=out, dataset=SETTINGS["dataset"], num_calibration_samples=2
    ),
    "compare": lambda s, out: convexprune.compare(s / "text", output=out, **COMPARED),
    "report": lambda s, out: _command("report", s / "run", "--output", out),
    "copies": lambda s, out: convexprune.prune(s / "dense", report_dir=out, output_dir=out.with_name("run"), **QUICK),
    "copies, overwriting": lambda s, out: convexprune.prune(
        s / "dense", report_dir=out, output_dir=out.with_name("run"), overwrite=True, **QUICK
    ),
}  # fmt: skip


def tried(command: str, sources: Path, around: Callable[[Path], None]) -> None:
    """Run a command in a folder that `around` has filled, and look at all that was there before."""
    with TemporaryDirectory() as temporary:
        here, elsewhere = Path(temporary, "here"), Path(temporary, "elsewhere")
        here.mkdir()
        (elsewhere / "folder").mkdir(parents=True)
        (elsewhere / "file").write_text("mine")
        around(here)
        out = here / "out"
        was_empty = out.is_dir() and not any(out.iterdir())
        before, given = seen(Path(temporary)), seen(sources)
        try:
            COMMANDS[command](sources, out)
        except ConvexpruneError as error:
            assert isinstance(error, OutputError), error
            assert seen(Path(temporary)) == before, error
        else:
            after = seen(Path(temporary))
            replaced = {"here/out", "elsewhere/folder"} if was_empty else set[str]()
            assert {name: after.get(name) for name in before if name not in replaced} == {
                name: value for name, value in before.items() if name not in replaced
            }
            results = ("here/out", "here/run", "elsewhere/folder")
            assert all(name.startswith(results) for name in after.keys() - before.keys())
        assert seen(sources) == given


things = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(BESIDE),
            st.sampled_from(["out", *(f"out/{name}" for name in OWN + USERS)]),
            st.sampled_from([f".out.part/{name}" for name in OWN + USERS]),
        ),
        st.sampled_from(KINDS),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(things=[("out", "folder"), ("out/work", "full")])
@example(things=[("out", "folder"), ("out/.backup.part", "file")])
@example(things=[(".out.part", "full")])
@example(things=[(".out.part", "link to a folder")])
@example(things=[(".out.part", "marked")])
@example(things=[("out", "link to a folder"), ("neighbour", "full")])
@example(things=[("out", "link to nothing")])
@example(things=[("out", "file")])
@given(things=things)
def test_nothing_of_the_users_is_changed(command: str, sources: Path, things: list[tuple[str, str]]):
    def around(here: Path) -> None:
        for name, kind in sorted(things, key=lambda thing: thing[0].count("/")):
            put(here / name, kind, here.parent / "elsewhere")

    tried(command, sources, around)


additions = st.lists(st.tuples(st.sampled_from(OWN + USERS), st.sampled_from(KINDS)), min_size=1, max_size=3)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name.startswith("prune")])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(things=[("work", "full")])
@example(things=[(".x.part", "file")])
@example(things=[("empty", "folder")])
@given(things=additions)
def test_what_the_user_adds_to_a_finished_run_stays(command: str, sources: Path, things: list[tuple[str, str]]):
    def around(here: Path) -> None:
        shutil.copytree(sources / "run", here / "out")
        for name, kind in things:
            put(here / "out" / name, kind, here.parent / "elsewhere")

    with TemporaryDirectory() as temporary:  # what is there by all these names already is no addition
        around(Path(temporary))
        is_new = len(seen(Path(temporary, "out"))) > len(seen(sources / "run"))
    if is_new:
        tried(command, sources, around)


@pytest.mark.parametrize("command", ["pack", "export", "compare", "prune"])
def test_a_place_of_another_command_that_goes_on_is_not_touched(command: str, sources: Path):
    def around(here: Path) -> None:
        staging = Staging(here / "out", "compare" if command == "prune" else "prune")
        with staging.held():
            (staging.place / "work").mkdir()

    tried(command, sources, around)


@pytest.mark.parametrize("command", ["pack", "unpack", "export", "export, gguf", "permute", "prune", "compare"])
def test_what_a_killed_command_left_is_removed(command: str, sources: Path, tmp_path: Path):
    staging = Staging(tmp_path / "out")
    with staging.held():
        (staging.begin() / "half").touch()
    COMMANDS[command](sources, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "half").exists()


@pytest.mark.parametrize("command", ["pack", "unpack", "export", "permute", "prune", "compare"])
@pytest.mark.parametrize("where", ["mount point", "current folder", "parent"])
def test_where_no_folder_can_be_put_is_said_before_any_work(
    command: str, where: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    out.mkdir()
    said = {"mount point": "is a mount point", "current folder": "is the current folder", "parent": "Nothing can be"}
    if where == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    elif where == "current folder":
        monkeypatch.chdir(out)
        out = Path()
    else:
        monkeypatch.setattr("convexprune._storage.staging.mkdtemp", _refuse)
    monkeypatch.setattr(Staging, "held", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(OutputError, match=f"{said[where]}.*NAME say") as error:
        COMMANDS[command](sources, out)
    assert "resume" not in str(error.value) and not any(out.iterdir()) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("command", ["pack", "unpack", "export", "permute", "prune", "compare"])
def test_nothing_is_put_in_the_place_of_the_root(command: str, sources: Path):
    with pytest.raises(OutputError, match=r"^/ is a mount point.*/NAME say"):
        COMMANDS[command](sources, Path("/"))


def _refuse(**_: object) -> str:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("command", ["pack", "unpack", "export", "permute"])
def test_a_full_disk_gives_no_advice_that_a_command_cannot_take(
    command: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convexprune._storage.staging.flush", full)
    with pytest.raises(OutputError, match=r"No space left on device\. Make room, and start again\.$"):
        COMMANDS[command](sources, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    ["pack  ../out", "unpack  ../out", "export  ../out", "pack dense ", "prune dense -o ", "permute dense -o ",
     "prune  -o ../out", "permute  -o ../out", "eval  --text licences", "bench ", "verify ", "inspect ", "report ",
     "compare  -o ../out"],
)  # fmt: skip
def test_an_empty_name_is_no_folder(words: str, sources: Path, dense: Path, tmp_path: Path, monkeypatch):
    kind = {"unpack": "pack", "export": "int4", "report": "run", "verify": "run"}.get(words.split()[0], "dense")
    here = Path(shutil.copytree(sources / kind, tmp_path / "here"))
    before = seen(tmp_path)
    monkeypatch.chdir(here)
    result = CliRunner().invoke(cli.app, [str(dense) if word == "dense" else word for word in words.split(" ")])
    assert isinstance(result.exception, ConvexpruneError), result.output
    assert re.search("empty text|current folder", str(result.exception)), result.exception
    assert seen(tmp_path) == before


@pytest.mark.parametrize(
    "words", [("report", "RUN", "--output", "PLACE"), ("recipe", "from-llmcompressor", "-o", "PLACE")]
)
def test_a_file_makes_no_folder_and_replaces_only_its_like(words: tuple[str, ...], sources: Path, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("oneshot_stage: {}\n")
    (tmp_path / "thesis.html").write_text("<p>mine")
    (tmp_path / "link").symlink_to(tmp_path / "thesis.html")
    before = seen(tmp_path)
    for place in ("nope/x.html", "thesis.html", "link", "."):
        given = {"RUN": str(sources / "run"), "PLACE": str(tmp_path / place)}
        line = [given.get(word, word) for word in words]
        if words[0] == "recipe":
            line.insert(2, str(tmp_path / "recipe.yaml"))
        result = CliRunner().invoke(cli.app, line)
        assert isinstance(result.exception, ConvexpruneError), result.output
        assert seen(tmp_path) == before
    if words[0] == "report":
        for _ in range(2):
            _command("report", sources / "run", "--output", tmp_path / "page.html")
