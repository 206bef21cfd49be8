"""A pack is smaller, and comes back bit for bit: blocks, files, folders, models."""

import filecmp
import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from runs import SETTINGS, flip
from safetensors.torch import save_file
from typer.testing import CliRunner

import convexprune
from convexprune._cli import app
from convexprune._cli.summary import summary
from convexprune._container import file as packing
from convexprune._container.file import contents, pack_file, packed_checksum, unpack_file
from convexprune._container.format import decode, encode, longest, width
from convexprune._runs.folder import RunFolder
from convexprune._storage.files import sha256
from convexprune._storage.tensors import BITS, Spec, entries, write_tensors
from convexprune.adapters._checkpoints import packed as reader
from convexprune.errors import ConvexpruneError, ModelError, OutputError, RecipeError

CODES = st.sampled_from(sorted(BITS))
# Zeros, negative zeros, quiet and signalling NaNs, infinities, denormals and all else, in any type.
PIECES = st.sampled_from([b"\0" * 16, b"\0\x80", b"\xff\xff", b"\x01\x7f", b"\x80\x7f", b"\x01\0\0\0", b"\x20\x3c"])


@st.composite
def _blocks(draw: st.DrawFn) -> tuple[str, bytes]:
    """A type, and bytes of whole entries of it."""
    code = draw(CODES)
    data = b"".join(draw(st.lists(PIECES | st.binary(max_size=64), max_size=20))) * draw(st.sampled_from([1, 1, 50]))
    return code, data[: len(data) - len(data) % width(BITS[code])]


@given(_blocks())
def test_a_block_comes_back_bit_for_bit(block: tuple[str, bytes]):
    code, data = block
    coded = encode(data, code, width(BITS[code]))
    assert decode(coded, len(data), code, width(BITS[code])) == data
    assert len(coded) <= longest(len(data))


@given(_blocks(), st.data())
def test_a_block_that_was_changed_is_refused_or_has_the_size_that_it_should_have(block: tuple[str, bytes], data):
    code, content = block
    coded = bytearray(encode(content, code, width(BITS[code])))
    begin = data.draw(st.integers(0, len(coded)))
    coded[begin : begin + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        found = decode(coded, len(content), code, width(BITS[code]))
    except ValueError:
        return
    assert len(found) == len(content)


def normal(count: int, dtype: torch.dtype, zeros: float) -> torch.Tensor:
    """Normal weights, the smallest share of them zero."""
    w = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.where(w.abs() <= w.float().abs().quantile(zeros).to(dtype), torch.zeros_like(w), w) if zeros else w


@pytest.mark.parametrize(("zeros", "bits"), [(0.0, 10.7), (0.5, 5.65), (0.6, 4.6), (0.7, 3.6), (0.8, 2.5)])
def test_zeros_make_bfloat16_as_small_as_the_table_says(tmp_path: Path, zeros: float, bits: float):
    w = normal(300_000, torch.bfloat16, zeros)
    save_file({"w": w}, tmp_path / "a.safetensors")
    pack_file(tmp_path / "a.safetensors", tmp_path / "a.pack.safetensors")
    assert 8 * (tmp_path / "a.pack.safetensors").stat().st_size / w.numel() < bits


@pytest.fixture
def every(tmp_path: Path) -> Path:
    """A file of tensors of every type and of odd shapes."""
    shapes = {"0-d": (), "empty": (0, 3), "odd": (3, 5, 8), "zeros": (40, 40)}
    specs = {
        f"{code}.{name}": Spec(code, shape, int(np.prod(shape)) * bits // 8)
        for code, bits in BITS.items()
        for name, shape in shapes.items()
        if np.prod(shape) * bits % 8 == 0
    }
    draw = np.random.default_rng(0)

    def read(name: str) -> bytearray:
        return bytearray(specs[name].nbytes) if "zeros" in name else bytearray(draw.bytes(specs[name].nbytes))

    write_tensors(tmp_path / "every.safetensors", specs, read, {"format": "pt", "ä": '"'})
    return tmp_path / "every.safetensors"


@pytest.mark.parametrize("block", [packing.BLOCK, 32])
def test_a_file_of_every_type_comes_back_byte_for_byte(every: Path, monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(packing, "BLOCK", block)
    packed, back = every.with_name("every.pack.safetensors"), every.with_name("back.safetensors")
    pack_file(every, packed)
    unpack_file(packed, back)
    assert back.read_bytes() == every.read_bytes()
    assert packed_checksum(packed) == sha256(every)
    assert contents(packed)[1] == every.stat().st_size


def test_what_gets_no_smaller_is_stored_as_it_is(every: Path):
    packed = every.with_name("every.pack.safetensors")
    pack_file(every, packed)
    dense, found = entries(every)[0], entries(packed)[0]
    assert all((found[n].spec == dense[n].spec) == ("zeros" not in n) for n in dense)
    assert all(found[n].spec.nbytes <= dense[n].spec.nbytes for n in dense)


def test_a_header_in_any_order_with_any_spaces_comes_back(tmp_path: Path):
    header = b'{ "b":{"shape":[2],"data_offsets":[1,5],"dtype":"BF16"},\t"\xc3\xa9":{"dtype":"U8",'
    header += b'"data_offsets":[0,1], "shape":[]}}   '
    path, packed, back = (tmp_path / f"{name}.safetensors" for name in ("a", "a.pack", "back"))
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\1\0\0\2\3")
    pack_file(path, packed)
    unpack_file(packed, back)
    assert back.read_bytes() == path.read_bytes()


def test_memory_is_that_of_a_block_and_not_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "BLOCK", 1 << 16)
    save_file({"w": normal(1 << 22, torch.bfloat16, 0.5)}, tmp_path / "a.safetensors")  # 8 MiB
    tracemalloc.start()
    pack_file(tmp_path / "a.safetensors", tmp_path / "a.pack.safetensors")
    unpack_file(tmp_path / "a.pack.safetensors", tmp_path / "back.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20
    assert filecmp.cmp(tmp_path / "a.safetensors", tmp_path / "back.safetensors", shallow=False)


# ---- folders


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run, of several shards."""
    folder = tmp_path_factory.mktemp("pack") / "pruned"
    convexprune.prune(dense, sparsity=0.7, output_dir=folder, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    """Its pack."""
    return convexprune.pack(pruned, pruned.with_name("packed")).output_dir


def test_a_folder_comes_back_file_by_file(pruned: Path, packed: Path, tmp_path: Path):
    assert _files(convexprune.unpack(packed, tmp_path / "back")) == _files(pruned)
    names = _files(packed).keys()
    assert {"config.json", "report.json", "recipe.yaml", "model.safetensors.index.json"} <= names
    assert not [n for n in names if n.endswith(".safetensors") and not n.endswith(".pack.safetensors")]


def test_the_outcome_counts_all_files(pruned: Path, tmp_path: Path):
    outcome = convexprune.pack(pruned, tmp_path / "packed")
    assert outcome.before == sum(map(len, _files(pruned).values()))
    assert outcome.after == sum(map(len, _files(tmp_path / "packed").values()))
    weights = sum(e.spec.nbytes // 4 for p in pruned.glob("*.safetensors") for e in entries(p)[0].values())
    coded = sum(p.stat().st_size for p in (tmp_path / "packed").glob("*.safetensors"))
    assert outcome.bits == pytest.approx(8 * coded / weights)


def test_what_is_loaded_is_the_model(pruned: Path, packed: Path):
    here, there = convexprune.load(packed, device="cpu"), convexprune.load(str(pruned), device="cpu")
    assert here.name_or_path == str(packed)
    head: Any = here.get_output_embeddings()
    assert head.weight is here.get_input_embeddings().weight  # tied, as they were
    for (name, one), (_, other) in zip(here.state_dict().items(), there.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert convexprune.load(packed, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_a_pack_on_the_hub_is_fetched_as_checkpoints_are(packed: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fetched(name: str, revision: str, offline: bool) -> Path:
        asked.append((name, revision, offline))
        return packed

    monkeypatch.setattr(reader, "local_folder", fetched)
    model = convexprune.load("someone/pruned", device="cpu", revision="v2")
    assert asked == [("someone/pruned", "v2", True)]  # the hub is off in tests
    assert model.name_or_path == "someone/pruned" and model.config.num_hidden_layers == 4


def test_the_command_line_packs_and_unpacks(pruned: Path, tmp_path: Path):
    run = CliRunner().invoke(app, ["pack", str(pruned), str(tmp_path / "packed")])
    assert run.exit_code == 0, run.output
    assert "bits a weight)" in run.output and "MB ->" in run.output and "memory and the time" in run.output
    assert CliRunner().invoke(app, ["unpack", str(tmp_path / "packed"), str(tmp_path / "back")]).exit_code == 0
    assert _files(tmp_path / "back") == _files(pruned)


def test_other_commands_say_that_a_pack_is_to_be_unpacked(packed: Path):
    with pytest.raises(ModelError, match=r"is a pack\. Unpack it first: convexprune unpack"):
        convexprune.prune(packed, output_dir=packed.with_name("again"), **SETTINGS)


def test_weights_in_other_formats_are_left_out_and_named(pruned: Path, tmp_path: Path, caplog):
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "config.json"):
        source = next(pruned.glob(name), None) or next(pruned.glob("*.safetensors"))
        (tmp_path / "model" / name).write_bytes(source.read_bytes())
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "model" / ".git").mkdir()
    (tmp_path / "model" / ".git" / "HEAD").write_text("x")
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "model" / "sub" / "notes.txt").write_text("y")
    convexprune.pack(tmp_path / "model", tmp_path / "out")
    assert _files(tmp_path / "out").keys() == {"model.pack.safetensors", "config.json", "sub/notes.txt"}
    assert "left out, weights in another format: pytorch_model.bin" in caplog.text


@pytest.mark.parametrize("command", [convexprune.pack, convexprune.unpack])
def test_a_folder_that_is_none_is_refused(command, pruned: Path, packed: Path, tmp_path: Path):
    wrong, right = (packed, pruned) if command is convexprune.pack else (pruned, packed)
    with pytest.raises(ModelError, match=r"is a pack already|is no pack"):
        command(wrong, tmp_path / "out")
    with pytest.raises(ModelError, match="no such folder"):
        command(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(OutputError, match="already holds something"):
        command(right, packed.parent)
    with pytest.raises(OutputError, match="lies inside"):
        command(right, right / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelError, match=r"holds no safetensors file|is no pack"):
        command(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_not_packed(stopped: Path, tmp_path: Path):
    with pytest.raises(OutputError, match="holds an unfinished run"):
        convexprune.pack(stopped, tmp_path / "out")


def test_notes_are_plain_json(packed: Path):
    metadata = entries(next(packed.glob("*.safetensors")))[1]
    assert json.loads(metadata[packing.NOTES]).keys() == {"version", "header", "checksums", "coded", "groups"}


# ---- prune --pack


def _weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in _files(folder).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def delivered(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that packs."""
    folder = tmp_path_factory.mktemp("delivered") / "out"
    convexprune.prune(dense, sparsity=0.7, output_dir=folder, pack=True, **SETTINGS)
    return folder


def test_a_run_that_packs_gives_the_pack_of_its_result(delivered: Path, pruned: Path, packed: Path, tmp_path: Path):
    assert _weights(delivered) == _weights(packed)
    back = convexprune.unpack(delivered, tmp_path / "back")
    assert _weights(back) == _weights(pruned)
    RunFolder(back).require_whole()  # its report has the checksums of the files as they are unpacked


def test_the_report_of_a_run_that_packs_tells_sizes(delivered: Path, dense: Path):
    report = convexprune.Report.from_json((delivered / "report.json").read_text())
    names = [name for name in _files(delivered) if name not in ("report.json", "README.md", "report.html")]
    assert report.packed and report.packed["after"] == sum((delivered / name).stat().st_size for name in names)
    assert report.packed["before"] > report.packed["after"]
    console = Console(width=80)
    with console.capture() as text:
        console.print(summary(report))
    assert "packed from" in text.get() and "memory and speed" in text.get()


def test_a_finished_pack_is_handed_back_and_read(delivered: Path, pruned: Path, dense: Path):
    again = convexprune.prune(dense, sparsity=0.7, output_dir=delivered, pack=True, resume=True, **SETTINGS)
    expected = convexprune.load(pruned, device="cpu").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("still", [True, False])
def test_a_run_that_was_stopped_while_it_packed_goes_on(
    dense: Path, pruned: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still: bool
):
    made = []

    def pack_one(path: Path, target: Path) -> None:
        if made:
            raise KeyboardInterrupt
        made.append(pack_file(path, target))

    settings = SETTINGS | {"sparsity": 0.7, "output_dir": tmp_path / "out"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("convexprune._container.folder.pack_file", pack_one)
        convexprune.prune(dense, pack=True, **settings)
    assert len(list((tmp_path / "out").glob("*.pack.safetensors"))) == 1
    convexprune.prune(dense, pack=still, resume=True, **settings)
    assert _weights(tmp_path / "out") == _weights(packed if still else pruned)


def test_a_pack_that_is_not_what_was_pruned_is_not_kept(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def pack_wrong(path: Path, target: Path) -> None:
        save_file({"w": torch.zeros(2)}, path.with_name("other"))
        pack_file(path.with_name("other"), target)

    monkeypatch.setattr("convexprune._container.folder.pack_file", pack_wrong)
    with pytest.raises(OutputError, match=r"model-00001.*pack\.safetensors: this is not model-00001"):
        convexprune.prune(dense, output_dir=tmp_path / "out", pack=True, **SETTINGS)
    assert any(not path.name.endswith(".pack.safetensors") for path in (tmp_path / "out").glob("*.safetensors"))


def test_a_damaged_pack_of_a_run_is_found(delivered: Path, dense: Path, tmp_path: Path):
    folder = Path(shutil.copytree(delivered, tmp_path / "out"))
    flip(min(folder.glob("*.pack.safetensors")))
    with pytest.raises(ConvexpruneError, match="damaged"):
        convexprune.prune(dense, sparsity=0.7, output_dir=folder, pack=True, resume=True, **SETTINGS)


def test_a_run_that_is_finished_is_not_packed_and_says_so(pruned: Path, dense: Path, caplog):
    convexprune.prune(dense, sparsity=0.7, output_dir=pruned, pack=True, resume=True, **SETTINGS)
    assert f"is finished without pack. For one: convexprune pack {pruned} DIR" in caplog.text


def test_what_is_pruned_in_memory_is_not_packed(dense: Path):
    with pytest.raises(RecipeError, match=r"pack=True .* output_dir"):
        convexprune.prune(dense, pack=True, **SETTINGS)


def test_a_run_that_packs_is_verified_once_it_is_unpacked(delivered: Path):
    with pytest.raises(ModelError, match="is a pack"):
        convexprune.verify(delivered)
