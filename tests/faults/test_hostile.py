"""Model folders that are damaged, hostile, or change while they are read."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import SETTINGS, checksums, flip, on_reports
from transformers import AutoModelForCausalLM

import convexprune
from convexprune._storage import files
from convexprune._storage.checkpoint import INDEX
from convexprune.adapters import EMBEDDED, HuggingFaceModel, given_tokenizer, load, reopen
from convexprune.adapters._checkpoints import model_folder
from convexprune.adapters._checkpoints.shards import Shards
from convexprune.adapters._inspection.inspection import inspect
from convexprune.errors import ModelError, OutputError


@pytest.fixture
def folder(dense: Path, tmp_path: Path) -> Path:
    """A model of several shards to spoil."""
    return Path(shutil.copytree(dense, tmp_path / "model"))


def _move_shards(folder: Path, move: Callable[[str], str]) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name in set(index["weight_map"].values()):
        if (path := folder / move(name)).is_relative_to(folder) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(path)
    index["weight_map"] = {tensor: move(name) for tensor, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "move", ["/absolute/{}", "../elsewhere/{}", "../../../../../etc/passwd", ".hidden/{}", "{}.bin"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path, move: str, stream: bool):
    _move_shards(folder, move.format)
    with pytest.raises(ModelError, match=r"index\.json names '.*below it"):
        load(folder, device="cpu", stream=stream)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", '{"metadata": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "[" * 100_000,
             '{"weight_map": {"a": "b.safetensors"}, "metadata": 5}'],
)  # fmt: skip
def test_what_is_no_index_is_refused(folder: Path, text: str):
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match=r"index\.json is no index of shards"):
        load(folder, device="cpu", stream=True)


def test_shards_of_one_name_in_several_folders_are_all_kept(folder: Path, tmp_path: Path, expected: dict[str, str]):
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    _move_shards(folder, lambda name: f"part{names.index(name)}/deep/x.safetensors")
    convexprune.prune(folder, output_dir=tmp_path / "out", **SETTINGS)
    found = {path.parts[-3]: path.read_bytes() for path in (tmp_path / "out").rglob("x.safetensors")}
    assert len(found) == len(names)
    for number, name in enumerate(names):
        assert hashlib.sha256(found[f"part{number}"]).hexdigest() == expected[name]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # warnings are errors


def _replace(path: Path) -> None:
    shutil.copy(path, path.with_name("new"))
    os.replace(path.with_name("new"), path)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(0, 1))  # whatever the clock's ticks


@pytest.mark.parametrize("change", [_replace, _overwrite, flip, lambda p: os.truncate(p, 900), Path.unlink])
def test_weights_that_change_while_they_are_used_are_noticed(folder: Path, tmp_path: Path, change: Callable[..., Any]):
    model = load(folder, device="cpu", stream=True)
    assert model.shards is not None
    layer = model.layers[1]
    path = model.shards.entry(f"{layer.name}.mlp.up_proj.weight").path  # pyright: ignore[reportOptionalMemberAccess]
    change(path)
    with pytest.raises(ModelError, match=path.name), model.resident(layer):
        pass
    with pytest.raises(ModelError, match=path.name):
        model.shards.assemble(tmp_path / "out", {})
    with pytest.raises(ModelError, match=path.name):
        model.origin()
    assert not (tmp_path / "out").exists()


def test_weights_that_change_while_the_result_is_written_make_no_model(folder: Path, tmp_path: Path, monkeypatch):
    model = load(folder, device="cpu", stream=True)
    assert model.shards is not None
    path = model.shards.files[0]
    monkeypatch.setattr(Shards, "_copy_companions", lambda *_: _overwrite(path))
    with pytest.raises(ModelError, match=rf"{path.name} has changed since it was opened"):
        model.shards.assemble(tmp_path / "out", {})
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_run_whose_weights_are_replaced_goes_on_once_they_are_back(folder: Path, tmp_path: Path, expected):
    out, path = tmp_path / "out", max(folder.glob("*.safetensors"))
    content = path.read_bytes()

    with pytest.raises(ModelError, match=rf"{path.name} has changed.*start again"):
        convexprune.prune(folder, output_dir=out, on_progress=on_reports(lambda _: _overwrite(path)), **SETTINGS)
    assert not checksums(out) and not (out / "report.json").exists()
    with pytest.raises(OutputError, match="differs in weights"):
        convexprune.prune(folder, output_dir=out, resume=True, **SETTINGS)
    path.write_bytes(content)
    convexprune.prune(folder, output_dir=out, resume=True, **SETTINGS)
    assert checksums(out) == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_worker_takes_the_same_weights_only(folder: Path, tmp_path: Path, stream: bool):
    def opened(folder: Path) -> Callable[..., HuggingFaceModel]:
        return lambda device, stream=stream, own=stream: load(folder, device=device, stream=own)

    model = opened(folder)("cpu")
    origin = model.origin()
    elsewhere = Path(shutil.copytree(folder, tmp_path / "copy"))  # as on another machine
    assert reopen(opened(elsewhere), origin, "cpu").streams == stream
    flip(max(elsewhere.glob("*.safetensors")))
    with pytest.raises(ModelError, match=r"has changed|is not the model that the run began with"):
        reopen(opened(elsewhere), origin, "cpu")


def test_a_model_in_memory_does_not_follow_its_files(folder: Path):
    model = load(folder, device="cpu").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(bytes(size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("stream", [True, False])
def test_an_adapter_beside_the_weights_is_refused(folder: Path, stream: bool):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config\.json\)\. Merge it first"):
        load(folder, device="cpu", stream=stream)


def test_links_are_copied_only_from_the_folder_and_the_blobs_of_the_hub(folder: Path, tmp_path: Path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    shutil.move(folder, snapshot)
    blobs.mkdir()
    (blobs / "1").write_text("of the hub")
    (snapshot / "blob.txt").symlink_to("../../blobs/1")
    (snapshot / "inside.txt").symlink_to("blob.txt")
    # another program's, by a name of ours: it would be taken for what the run says of itself
    (snapshot / "report.json").write_text('{"by": "another"}')
    load(snapshot, device="cpu", stream=True).shards.assemble(tmp_path / "out", {})  # pyright: ignore
    copied = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.txt")}
    assert copied == {"blob.txt": "of the hub", "inside.txt": "of the hub"}
    assert not any(path.is_symlink() or path.name == "report.json" for path in (tmp_path / "out").iterdir())
    (blobs / "2").symlink_to("/etc/passwd")
    for target in ("/etc/passwd", "../../blobs/2", "../../refs"):
        (tmp_path / "repo" / "refs").write_text("beside the blobs")
        (snapshot / "notes.txt").symlink_to(target)
        with pytest.raises(ModelError, match=r"notes\.txt is a link to .*outside of the model's folder"):
            load(snapshot, device="cpu", stream=True)
        (snapshot / "notes.txt").unlink()


@pytest.mark.parametrize("name", ["model-x.safetensors", "config.json", "tokenizer.json"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path, name: str):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=rf"{name} is no ordinary file"):
        load(folder, device="cpu", stream=True)


def test_weights_that_cannot_be_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = max(folder.glob("*.safetensors"))
    open_ = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return open_(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ModelError, match=rf"{path.name} cannot be read: Permission denied"):
            load(folder, device="cpu")
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ModelError, match=rf"{path.name} cannot be read: No such file"):
        load(folder, device="cpu")
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelError, match=rf"{path.name} is no ordinary file"):
        load(folder, device="cpu")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("hidden_size", "256", "cannot be read"),
        ("num_attention_heads", 0, "cannot be read"),
        ("num_hidden_layers", 10**6, r"asks for 1,000,000 decoder layers, the checkpoint holds \d+ tensors"),
    ],
)
def test_a_configuration_that_is_not_right_is_refused(folder: Path, name: str, setting: Any, message: str, stream):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: setting}))
    with pytest.raises(ModelError, match=message):
        load(folder, device="cpu", stream=stream)
    with pytest.raises(ModelError, match=message):
        inspect(folder)


def test_a_tokenizer_with_a_broken_merge_is_refused(folder: Path):
    tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].append(["no such", "token"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"\(tokenizer\): cannot be read.*Is the folder complete and undamaged"):
        load(folder, device="cpu")


class _Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_that_would_run_something_does_not(folder: Path, tmp_path: Path):
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    torch.save({"a": _Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"more than tensors, and that is not run\. Convert") as caught:
        load(folder, device="cpu", allow_pickle=True)
    assert "weights_only" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trusted", [True, False])
def test_code_goes_along_only_if_it_was_trusted(folder: Path, tmp_path: Path, trusted: bool):
    for name in ("config.json", "tokenizer_config.json"):
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(known | {"auto_map": {"AutoModel": "evil.Evil"}}))
    (folder / "evil.py").write_text("raise SystemExit")
    model = load(folder, device="cpu", stream=True)
    assert model.shards is not None
    model.shards.trusted = trusted
    model.shards.assemble(tmp_path / "out", {})
    assert (tmp_path / "out" / "evil.py").exists() == trusted
    for name in ("config.json", "tokenizer_config.json"):
        assert ("auto_map" in json.loads((tmp_path / "out" / name).read_text())) == trusted


def test_the_hub_is_asked_once_whether_it_is_there(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def head(url: str, timeout: float) -> None:
        asked.append(url)
        if len(asked) < 4:
            raise ConnectionError

    assert not model_folder.hub_answers() and not asked  # HF_HUB_OFFLINE is set
    monkeypatch.setattr(model_folder.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model_folder, "get_session", lambda: SimpleNamespace(head=head))
    for ask in (partial(load, device="cpu"), inspect, given_tokenizer):
        with pytest.raises(ModelError, match=r"^models/mistyped.*: there is no such folder here"):
            ask("models/mistyped")
    assert len(asked) == 3
    assert model_folder.hub_answers()


def test_the_tokenizer_that_was_given_is_flushed_too(folder: Path, tmp_path: Path, monkeypatch):
    flushed = set[str]()
    monkeypatch.setattr(files, "_sync", lambda path: flushed.add(path.name))
    convexprune.prune(folder, tokenizer=str(EMBEDDED), output_dir=tmp_path / "out", **SETTINGS)  # pyright: ignore
    assert "tokenizer.json" in flushed and (tmp_path / "out" / "tokenizer.json").is_file()
    assert "tokenizer.json" in json.loads((tmp_path / "out" / "report.json").read_text())["files"]
