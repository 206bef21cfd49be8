"""A pack is smaller, and comes back bit for bit: folders, models, runs that pack."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from runs import SETTINGS, flip
from safetensors.torch import save_file
from test_gguf import built, exported, quantized
from tiny_families import TOKENS, build_family
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import convexprune
from convexprune._cli import app
from convexprune._cli.pruning import summary
from convexprune._container import file as packing
from convexprune._container.file import pack_file
from convexprune._runs.folder import RunFolder
from convexprune._storage.tensors import entries
from convexprune.adapters._loading import packed as reader
from convexprune.constraints import Block, make_grid
from convexprune.errors import ConvexpruneError, ModelError, OutputError, RecipeError


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


def test_a_folder_without_one_of_its_shards_is_not_packed(dense: Path, tmp_path: Path):
    folder = shutil.copytree(dense, tmp_path / "model")
    missing = max(folder.glob("*.safetensors"))
    missing.unlink()
    with pytest.raises(ModelError, match=rf"index\.json names {missing.name}, which is missing"):
        convexprune.pack(folder, tmp_path / "packed")


def test_the_outcome_counts_all_files(pruned: Path, tmp_path: Path):
    outcome = convexprune.pack(pruned, tmp_path / "packed")
    assert outcome.before == sum(map(len, _files(pruned).values()))
    assert outcome.after == sum(map(len, _files(tmp_path / "packed").values()))
    weights = sum(e.spec.nbytes // 4 for p in pruned.glob("*.safetensors") for e in entries(p)[0].values())
    coded = sum(p.stat().st_size for p in (tmp_path / "packed").glob("*.safetensors"))
    assert outcome.bits == pytest.approx(8 * coded / weights)
    stored = {n: e.spec.nbytes for p in (tmp_path / "packed").glob("*.safetensors") for n, e in entries(p)[0].items()}
    operators = RunFolder(pruned).report().operators
    own, count = sum(stored[f"{o.name}.weight"] for o in operators), sum(o.outputs * o.inputs for o in operators)
    assert outcome.operator_bits == pytest.approx(8 * own / count)
    (shutil.copytree(pruned, tmp_path / "damaged") / "report.json").write_text("{")
    assert convexprune.pack(tmp_path / "damaged", tmp_path / "new", allow_changed=True).operator_bits is None


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
    assert "bits a weight: " in run.output and "MB ->" in run.output and "memory and the time" in run.output
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
    with pytest.raises(OutputError, match="is unfinished"):
        convexprune.pack(stopped, tmp_path / "pack")


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
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        convexprune.prune(dense, sparsity=0.7, output_dir=folder.name, pack=True, **SETTINGS)  # a relative path
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
    assert len(made) == 1 and not list((tmp_path / "out").rglob("*.pack.safetensors"))
    convexprune.prune(dense, pack=still, resume=True, **settings)
    assert _weights(tmp_path / "out") == _weights(packed if still else pruned)


def test_a_pack_that_is_not_what_was_pruned_is_not_kept(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def pack_wrong(path: Path, target: Path) -> None:
        save_file({"w": torch.zeros(2)}, path.with_name("other"))
        pack_file(path.with_name("other"), target)

    monkeypatch.setattr("convexprune._container.folder.pack_file", pack_wrong)
    with pytest.raises(OutputError, match=r"model-00001.*pack\.safetensors: this is not model-00001"):
        convexprune.prune(dense, output_dir=tmp_path / "out", pack=True, **SETTINGS)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.part" / "run.json").is_file()
    monkeypatch.undo()
    convexprune.prune(dense, output_dir=tmp_path / "out", pack=True, resume=True, **SETTINGS)
    assert list((tmp_path / "out").glob("*.pack.safetensors"))


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


@pytest.mark.long
@pytest.mark.parametrize("kind", ["q4_k", "iq4_nl", "q3_k"])
def test_a_pack_stores_codes_once(kind: str, tmp_path: Path):
    source = built("qwen3moe" if kind == "q4_k" else "llama", tmp_path / "dense", torch.bfloat16)
    run = quantized(source, tmp_path / "run", quantize=kind)
    pack = convexprune.pack(run, tmp_path / "pack")
    path = exported(run, tmp_path / "model.gguf")
    packed = sum(file.stat().st_size for file in pack.output_dir.iterdir() if file.suffix in (".safetensors", ".ggml"))
    assert packed < path.stat().st_size + 20_000  # what is not quantized is smaller in a pack
    assert pack.operator_bits is None or abs(pack.operator_bits - cast(Block, make_grid(kind)).bits) < 0.01
    again = convexprune.unpack(pack.output_dir, tmp_path / "again")
    files = {file.name for file in run.iterdir()}
    assert files == {file.name for file in again.iterdir()}
    assert all((again / name).read_bytes() == (run / name).read_bytes() for name in files)
    loaded = convexprune.load(pack.output_dir).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(run).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())
    blocks = bytearray((pack.output_dir / "blocks.ggml").read_bytes())
    blocks[-1] ^= 1
    (pack.output_dir / "blocks.ggml").write_bytes(blocks)
    with pytest.raises((ModelError, OutputError)):
        convexprune.unpack(pack.output_dir, tmp_path / "damaged", allow_changed=True)


def test_a_weight_that_is_stored_transposed_is_packed_without_its_blocks(tmp_path: Path):
    build_family("gpt2").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    run = quantized(tmp_path / "dense", tmp_path / "run", quantize="q8_0", dataset=TOKENS)
    again = convexprune.unpack(convexprune.pack(run, tmp_path / "pack").output_dir, tmp_path / "again")
    assert _files(again) == _files(run)
