"""A result that is not what its run wrote is refused by every command that reads a model, unless that is allowed."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SETTINGS
from safetensors.torch import load_file, save_file
from tiny_models import TINY
from typer.testing import CliRunner

import convexprune
from convexprune import _cli as cli
from convexprune import errors
from convexprune._container import compressed_tensors, file, folder
from convexprune._rendering.card import card
from convexprune._rendering.page import page
from convexprune._runs.folder import RunFolder
from convexprune.adapters._loading import loading, packed

QUICK: dict[str, Any] = SETTINGS | {"method": "magnitude"}
QUANTIZED: dict[str, Any] = SETTINGS | {"sparsity": 0, "quantize": "int4", "group_size": -1}
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sources(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and results of it: pruned, quantized, and a pack."""
    place = tmp_path_factory.mktemp("sources")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        TINY["llama"]().save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    convexprune.prune(place / "dense", output_dir=place / "run", **QUICK)
    convexprune.prune(place / "dense", output_dir=place / "int4", **QUANTIZED)
    convexprune.pack(place / "run", place / "pack")
    return place


def _command(*words: str | Path) -> None:
    found = CliRunner().invoke(cli.app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output


SHORT = ["--text", "licences", "--window", "16", "--max-windows", "1"]
COMPARED = ["--no-plots", "--methods=magnitude", "--eval-text=licences", "--eval-window=16", "--eval-windows=1"]
COMPARED += ["--num-calibration-samples=2", "--max-seq-length=16", "--held-out-samples=1"]
READERS: dict[str, tuple[str, Callable[[Path, Path, list[str]], object]]] = {
    "pack": ("run", lambda run, out, flag: _command("pack", run, out, *flag)),
    "export": ("int4", lambda run, out, flag: _command("export", run, out, *flag)),
    "unpack": ("pack", lambda run, out, flag: _command("unpack", run, out, *flag)),
    "eval": ("run", lambda run, out, flag: _command("eval", run, *SHORT, *flag)),
    "eval, against it": ("run", lambda run, out, flag: _command("eval", "--against", run, run, *SHORT, *flag)),
    "bench": ("run", lambda run, out, flag: _command("bench", run, "--seconds", "0.01", "--batch", "1", *flag)),
    "compare": ("run", lambda run, out, flag: _command("compare", run, "-o", out, *COMPARED, *flag)),
    "permute": ("run", lambda run, out, flag: convexprune.permute(
        run, output_dir=out, dataset=SETTINGS["dataset"], num_calibration_samples=2, allow_changed=bool(flag))),
    "prune": ("run", lambda run, out, flag: convexprune.prune(
        run, output_dir=out, allow_changed=bool(flag), **QUICK)),
    "prune in memory": ("run", lambda run, out, flag: convexprune.prune(run, allow_changed=bool(flag), **QUICK)),
    "load": ("run", lambda run, out, flag: convexprune.load(run, allow_changed=bool(flag))),
    "load a pack": ("pack", lambda run, out, flag: convexprune.load(run, allow_changed=bool(flag))),
    "report": ("run", lambda run, out, flag: _command("report", run, "--output", out, *flag)),
}  # fmt: skip


def _negate(run: Path) -> None:
    path = next(run.glob("*.safetensors"))
    if path.name.endswith(".pack.safetensors"):
        convexprune.unpack(run, run.with_name("plain"))
        _negate(run.with_name("plain"))
        path.unlink()
        file.pack_file(run.with_name("plain") / "model.safetensors", path)
        return
    tensors = load_file(path)
    save_file(tensors | {WEIGHT: -tensors[WEIGHT]}, path, {"format": "pt"})


def _settings(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


@pytest.mark.parametrize("change", [_negate, _settings])
@pytest.mark.parametrize("reader", READERS)
def test_a_result_that_is_not_what_the_run_wrote_is_refused(reader: str, change: Any, sources: Path, tmp_path: Path):
    kind, read = READERS[reader]
    run = Path(shutil.copytree(sources / kind, tmp_path / "run"))
    change(run)
    with pytest.raises(errors.OutputError, match=r"is damaged, by the checksums in report\.json.*--allow-changed"):
        read(run, tmp_path / "out", [])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()
    if change is _settings or kind != "int4":  # negated codes are another grid's
        read(run, tmp_path / "out", ["--allow-changed"])


def test_weights_that_the_run_did_not_write_are_refused_and_other_reports_are_not_read(sources: Path, tmp_path: Path):
    run = Path(shutil.copytree(sources / "run", tmp_path / "run"))
    shutil.copy(run / "model.safetensors", run / "more.safetensors")
    with pytest.raises(errors.OutputError, match=r"more\.safetensors was not written by the run"):
        convexprune.load(run)
    (run / "report.json").write_text('{"created": 1}')
    convexprune.load(run)


TEXTS = ["{}", "[]", "null", "1", "", "{", '{"recipe": {}}', '{"checksum": "0", "files": {}}']


EACH = {reader: TEXTS[::7] for reader in ("pack", "eval", "eval, against it", "export", "report")} | {"load": TEXTS}
DAMAGED = [
    pytest.param(reader, text, marks=[] if text in quick else pytest.mark.long)
    for reader, quick in EACH.items()
    for text in TEXTS
]


@pytest.mark.parametrize(("reader", "text"), DAMAGED)
def test_a_damaged_report_is_refused(reader: str, text: str, sources: Path, tmp_path: Path):
    kind, read = READERS[reader]
    run = Path(shutil.copytree(sources / kind, tmp_path / "run"))
    (run / "report.json").write_text(text)
    with pytest.raises(errors.OutputError, match=r"report\.json is damaged, or .*Put back what was written") as caught:
        read(run, tmp_path / "out", [])
    assert not {"KeyError", "TypeError", "AttributeError"} & {
        *str(caught.value).replace("(", " ").replace(":", " ").split()
    }
    assert not (tmp_path / "out").exists()
    if reader not in ("export", "report"):  # which need it
        assert "--allow-changed" in str(caught.value)
        read(run, tmp_path / "out", ["--allow-changed"])


def test_a_gguf_file_needs_the_report_of_block_grids_and_no_other(sources: Path, tmp_path: Path):
    dense = Path(shutil.copytree(sources / "dense", tmp_path / "dense"))
    (dense / "report.json").write_text('{"created": 1}')
    convexprune.export(dense, tmp_path / "dense.gguf", "gguf")
    (dense / "report.json").unlink()
    (dense / "blocks.ggml").touch()
    with pytest.raises(errors.OutputError, match=r"holds blocks\.ggml, but not the report\.json"):
        convexprune.export(dense, tmp_path / "blocks.gguf", "gguf")


def test_a_full_disk_is_named_and_no_half_of_a_gguf_file_stays(sources: Path, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # in the middle of a tensor
    try:
        with pytest.raises(errors.OutputError, match=r"cannot be written: .*File too large.* Make room"):
            convexprune.export(sources / "dense", tmp_path / "model.gguf", "gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def _replace(path: Path) -> None:
    shutil.copy(path, path.with_name("new"))
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("reader", ["pack", "export", "unpack", "load", "eval", "prune in memory"])
def test_files_that_are_replaced_while_they_are_read_are_noticed(
    reader: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kind, read = READERS[reader]
    run = Path(shutil.copytree(sources / kind, tmp_path / "run"))
    path = next(run.glob("*.safetensors"))
    for module, name in ((folder, "copy_file"), (compressed_tensors, "write_settings"), (loading, "read_tokenizer")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real: (_replace(path), real(*a)))
    reads: Any = packed
    real_read = reads.read_model
    monkeypatch.setattr(reads, "read_model", lambda *a, **b: (_replace(path), real_read(*a, **b))[1])
    with pytest.raises(errors.ModelError, match=f"{path.name} has changed since it was opened"):
        read(run, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "null", "{", "1", None])
def test_an_export_without_settings_is_refused(text: str | None, sources: Path, tmp_path: Path):
    run = Path(shutil.copytree(sources / "int4", tmp_path / "run"))
    (run / "config.json").unlink() if text is None else (run / "config.json").write_text(text)
    with pytest.raises(errors.OutputError, match=r"config\.json is (missing|damaged)"):
        convexprune.export(run, tmp_path / "out")
    with pytest.raises(errors.ModelError, match=r"config\.json"):
        convexprune.export(run, tmp_path / "out", allow_changed=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"weight_map": []}', "{", '{"weight_map": {"a": 3}}', "[" * 9999],
)
def test_an_export_of_an_odd_index_is_refused(text: str, sources: Path, tmp_path: Path):
    run = Path(shutil.copytree(sources / "int4", tmp_path / "run"))
    (run / "model.safetensors.index.json").write_text(text)
    with pytest.raises(errors.ModelError, match=r"index\.json is damaged"):
        convexprune.export(run, tmp_path / "out", allow_changed=True)
    assert not (tmp_path / "out").exists()


def test_a_link_to_itself_is_no_traceback(sources: Path, tmp_path: Path):
    run = Path(shutil.copytree(sources / "run", tmp_path / "run"))
    (run / "loop.txt").symlink_to(run / "loop.txt")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    for source, target in ((run, "out"), (tmp_path / "itself", "out"), (sources / "run", "itself")):
        with pytest.raises(errors.ConvexpruneError):
            convexprune.pack(source, tmp_path / target)


def test_no_control_character_of_a_name_reaches_a_page_or_a_card(sources: Path):
    report = RunFolder(sources / "run").report()
    report.recipe["model"] = "evil\x1b[31m\x07\u202e/name"
    report.recipe["dataset"] = report.warnings = ["\x1b]0;title\x07"]
    for text in (card(report), page(report, "dir\x1b[2J")):
        assert not [c for c in text if not c.isprintable() and c not in "\n\t"]
