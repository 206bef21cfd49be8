"""Packs that are damaged, cut short or made to do harm are refused, cost no memory, and leave nothing behind."""

import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

import convexprune
from convexprune._cli import app
from convexprune._container.file import CHECKSUM, NOTES, pack_file, packed_checksum, unpack_file
from convexprune._container.format import decode
from convexprune._storage.files import sha256
from convexprune._storage.tensors import Spec, entries, write_tensors
from convexprune.errors import ModelError, OutputError

PACK = "model.pack.safetensors"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack of a file with a coded tensor and with one that is stored as it is."""
    folder = tmp_path_factory.mktemp("good")
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    tensors = {"w": torch.where(weight.abs() < 1, 0, weight).to(torch.bfloat16), "norm": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    pack_file(folder / "model.safetensors", folder / PACK)
    return folder


@given(st.data())
def test_any_change_of_bytes_is_refused_or_changes_nothing(good: Path, tmp_path_factory, data):
    content, path = bytearray((good / PACK).read_bytes()), tmp_path_factory.mktemp("changed") / PACK
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(content) - 1))
        content[begin : begin + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    try:
        found = packed_checksum(path)
    except ModelError:
        return
    assert found == sha256(good / "model.safetensors")


@pytest.mark.parametrize("position", [3, 60, 500, -2000, -100, -1])
def test_a_flipped_bit_and_a_missing_end_are_refused(good: Path, tmp_path: Path, position: int):
    content = bytearray((good / PACK).read_bytes())
    content[position] ^= 16
    for number, wrong in enumerate((content, content[:position])):
        (tmp_path / PACK).write_bytes(wrong)
        with pytest.raises(ModelError, match=r"pack\.safetensors: damaged or cut short"):
            unpack_file(tmp_path / PACK, tmp_path / f"{number}.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [PACK]


def _rewritten(good: Path, path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> Path:
    """The pack with other notes, of which the checksum is right, and other coded bytes."""
    found, metadata = entries(good / PACK)
    notes, data = json.loads(metadata[NOTES]), {name: bytes(e.read_bytes()) for name, e in found.items()}
    change(notes, data)
    text = json.dumps(notes)
    specs = {
        name: found[name].spec
        if name in found and found[name].spec.nbytes == len(value)
        else Spec("U8", (len(value),), len(value))
        for name, value in data.items()
    }
    metadata = {NOTES: text, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}
    write_tensors(path, specs, lambda name: bytearray(data[name]), metadata)
    return path


def _frame(content: bytes) -> bytes:
    frame = zstandard.compress(content)
    return len(frame).to_bytes(4, "little") + frame


def _block(*streams: bytes) -> bytes:
    coded = b"".join(map(_frame, streams))
    return len(coded).to_bytes(4, "little") + coded


def _larger(notes: dict[str, Any], _: Any) -> None:
    """A tensor of 16 TiB in the header, of which the file holds a few bytes."""
    header = json.loads(notes["header"])
    header["w"] |= {"shape": [1 << 43], "data_offsets": [12, 12 + (1 << 44)]}
    header["norm"] |= {"data_offsets": [0, 12]}
    notes["header"] = json.dumps(header)


def _wide(notes: dict[str, Any], data: Any) -> None:
    """The same in one row, which would be decoded at once."""
    _larger(notes, data)
    notes["header"] = notes["header"].replace(f"[{1 << 43}]", f"[1, {1 << 43}]")
    notes["groups"] = {"w": -1}


HOSTILE: dict[str, tuple[Callable[[dict[str, Any], dict[str, bytes]], Any], str]] = {
    "a bomb in the mask": (lambda _, d: d.update(w=_block(bytes(1 << 26))), "a stream that is not of 512 bytes"),
    "a bomb in the values": (
        lambda _, d: d.update(w=_block(b"\xff" * 512, bytes(15), bytes(1 << 26))), "that is not of 4,096 bytes",
    ),
    "a frame that does not say its size": (
        lambda _, d: d.update(w=_raw(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(512)))),
        "a stream that is not of 512 bytes",
    ),
    "a block of 4 GiB": (lambda _, d: d.update(w=b"\xff\xff\xff\xff" + d["w"][4:]), "4,294,967,295 bytes for a block"),
    "a stream of 4 GiB": (lambda _, d: d.update(w=d["w"][:4] + b"\xff\xff\xff\xff" + d["w"][8:]), "ends too early"),
    "bytes that belong to nothing": (lambda _, d: d.update(w=d["w"] + b"more"), "4 bytes more than a tensor has"),
    "another tensor": (lambda _, d: d.update(w=_block(bytes(512), bytes(15))), "not the one that was packed"),
    "a tensor that no header tells of": (lambda _, d: d.update(more=b"x"), "not those that it tells of"),
    "a tensor that is missing": (lambda _, d: d.pop("norm"), "not those that it tells of"),
    "a tensor that is said to be coded": (lambda n, _: n.update(coded=["w", "norm"]), "damaged or cut short"),
    "a coded tensor that is said not to be": (lambda n, _: n.update(coded=[]), "w is not what it was"),
    "no checksums": (lambda n, _: n.pop("checksums"), "damaged or cut short"),
    "coded is no list": (lambda n, _: n.update(coded=3), "damaged or cut short"),
    "checksums are a list": (lambda n, _: n.update(checksums=["w", "norm"]), "damaged or cut short"),
    "a header that is none": (lambda n, _: n.update(header='{"w":1}'), "damaged or cut short"),
    "a header that nests": (lambda n, _: n.update(header="[" * 100_000), "damaged or cut short"),
    "groups of a vector": (lambda n, _: n.update(groups={"norm": 64}), "in groups of 64"),
    "groups of a size that there is not": (lambda n, _: n.update(groups={"w": 7}), "in groups of 7"),
    "a row of 16 TiB": (_wide, "too wide to be coded"),
    "a later version": (lambda n, _: n.update(version=3), "version 3 of the format. Known: 2"),
}  # fmt: skip


def _raw(frame: bytes) -> bytes:
    stream = len(frame).to_bytes(4, "little") + frame
    return len(stream).to_bytes(4, "little") + stream


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_made_to_do_harm_is_refused_and_costs_no_memory(good: Path, tmp_path: Path, kind: str):
    change, message = HOSTILE[kind]
    path = _rewritten(good, tmp_path / PACK, change)
    tracemalloc.start()
    with pytest.raises(ModelError, match=message):
        unpack_file(path, tmp_path / "out.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert not (tmp_path / "out.safetensors").exists()


def test_a_size_that_the_disk_does_not_have_is_refused_at_once(good: Path, tmp_path: Path):
    (tmp_path / "pack").mkdir()
    _rewritten(good, tmp_path / "pack" / PACK, _larger)
    with pytest.raises(OutputError, match=r"17,592,[\d,]+ bytes are needed, and .* are free"):
        convexprune.unpack(tmp_path / "pack", tmp_path / "out", allow_large=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


@pytest.mark.parametrize("nbytes", [0, 2, 1 << 21])
def test_no_bytes_are_no_block(nbytes: int):
    with pytest.raises(ValueError, match=r"a stream|content size|more than a block has"):
        decode(b"" if nbytes else b"\0\0\0\0\1", nbytes, "BF16", 2)


# ---- folders


@pytest.fixture
def folder(dense: Path, tmp_path: Path) -> Path:
    """The folder of a pack to spoil."""
    return convexprune.pack(dense, tmp_path / "pack").output_dir


def _outside(folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(folder.parent / "secret.txt")


def _links_to_a_folder(folder: Path) -> None:
    (folder / "etc").symlink_to("/etc")


def _twice(folder: Path) -> None:
    first = min(folder.glob("*.pack.safetensors"))
    shutil.copy(first, folder / first.name.replace(".pack", ""))


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.json")


def _not_a_pack(folder: Path) -> None:
    first = min(folder.glob("*.pack.safetensors"))
    save_file({"w": torch.ones(2)}, first)


SPOILT = {
    _outside: "is a link to", _links_to_a_folder: "is a link to", _pipe: "is no ordinary file",
    _twice: "holds a file and its pack as well", _not_a_pack: "it was not packed by convexprune",
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_folder_that_was_spoilt_is_refused_and_nothing_is_left(folder: Path, tmp_path: Path, spoil):
    spoil(folder)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ModelError, match=SPOILT[spoil]):
        convexprune.unpack(folder, tmp_path / "out")
    with pytest.raises(ModelError, match=SPOILT[spoil]):
        convexprune.load(folder, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == before


def _spy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The files that are unpacked from now on."""
    seen = list[Any]()
    monkeypatch.setattr("convexprune._container.folder.unpack_file", lambda *paths: seen.append(paths))
    return seen


def test_a_bomb_is_refused_before_anything_is_written(folder: Path, good: Path, tmp_path: Path, monkeypatch):
    """A few hundred bytes that unpack to 16 TiB of zeros, beside the configuration of a small model."""
    seen = _spy(monkeypatch)
    _rewritten(good, folder / ("more-" + PACK), _larger)
    with pytest.raises(
        ModelError, match=r"unpacks to 17,592,[\d,]+, nearly all zero. Accepted: 400 times .*--allow-large"
    ):
        convexprune.unpack(folder, tmp_path / "out")
    with pytest.raises(
        ModelError, match=r"unpacks to 8,796,[\d,]+ weights, and the model of its config.json has [\d,]+\. A"
    ):
        convexprune.load(folder, device="cpu")
    assert not seen and [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_a_pack_is_loaded_if_its_config_admits_it_and_unpacked_if_that_is_allowed(
    folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("convexprune._container.folder.ROOM", 0)
    monkeypatch.setattr("convexprune._container.folder.RATIO", 0)
    convexprune.load(folder, device="cpu")
    with pytest.raises(ModelError, match="nearly all zero"):
        convexprune.unpack(folder, tmp_path / "out")
    result = CliRunner().invoke(app, ["unpack", str(folder), str(tmp_path / "out"), "--allow-large"])
    assert result.exit_code == 0 and (tmp_path / "out").is_dir()


def test_a_configuration_of_more_layers_than_a_pack_has_tensors_is_not_built(folder: Path):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**9}))
    with pytest.raises(ModelError, match="asks for 1,000,000,000 decoder layers"):
        convexprune.load(folder, device="cpu")


def test_a_pack_in_the_cache_of_the_hub_is_links_to_its_blobs(folder: Path, dense: Path, tmp_path: Path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        (snapshot / path.name).symlink_to(path.replace(blobs / str(number)))
    out = convexprune.unpack(snapshot, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {p.name: p.read_bytes() for p in dense.iterdir()}


def test_an_index_that_leads_out_of_the_pack_is_refused(folder: Path):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../model.safetensors")
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError):
        convexprune.load(folder, device="cpu")


def test_pickles_in_a_pack_are_not_read(folder: Path):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only as pickles"):
        convexprune.load(folder, device="cpu")


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convexprune._container.file.write", full)
    with pytest.raises(OutputError, match="Make room, and start again"):
        convexprune.unpack(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]
