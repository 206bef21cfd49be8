"""Damage to what an unfinished run says of itself is told from another run, and never costs what is finished."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import SETTINGS, checksums, cut, empty, flip, place_of, stop_after
from safetensors.torch import load_file, save_file

import convexprune
from convexprune import errors
from convexprune._runs.folder import RunFolder

SAMPLED: dict[str, Any] = SETTINGS | {"dataset": "self", "max_seq_length": 16}


def _resumed(dense: Path, folder: Path, **settings: Any) -> convexprune.PruneResult:
    return convexprune.prune(dense, output_dir=folder, resume=True, **SETTINGS | settings)


def _other_digit(path: Path) -> None:
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


@pytest.mark.parametrize("damage", [flip, cut, empty, _other_digit, Path.unlink])
def test_without_what_a_run_began_with_nothing_is_done_and_nothing_is_lost(dense, stopped: Path, expected, damage):
    run = place_of(stopped) / "run.json"
    kept = run.read_bytes()
    damage(run)
    before = sorted(stopped.parent.rglob("*"))
    wrong = "2 finished layers, but run.json.* is missing" if damage == Path.unlink else "run.json is damaged"
    for resume in (True, False):
        with pytest.raises(errors.OutputError, match=wrong + ".*Put .*back.*, or remove the folder to begin again"):
            convexprune.prune(dense, output_dir=stopped, resume=resume, **SETTINGS)
    assert sorted(stopped.parent.rglob("*")) == before
    run.write_bytes(kept)
    _resumed(dense, stopped)
    assert checksums(stopped) == expected


@pytest.fixture
def sampled(dense: Path, tmp_path: Path) -> Path:
    """The folder of a run on text that the model wrote, interrupted in its second layer."""
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, output_dir=tmp_path / "out", evaluation="self", on_progress=stop_after(1), **SAMPLED)
    return tmp_path / "out"


def test_damaged_windows_are_sampled_again_and_are_the_same(dense: Path, sampled: Path, tmp_path: Path, caplog):
    tokens = place_of(sampled) / "work" / "tokens.safetensors"
    windows = load_file(tokens)
    windows["evaluation"][0, 3] ^= 1  # a file as good as any, but for its checksum
    save_file(windows, tokens)
    again = _resumed(dense, sampled, evaluation="self", **SAMPLED)
    assert "tokens.safetensors is damaged: the windows that the model wrote are sampled again" in caplog.text
    peace = convexprune.prune(dense, output_dir=tmp_path / "peace", evaluation="self", **SAMPLED)
    assert again.report.perplexity == peace.report.perplexity
    assert checksums(sampled) == checksums(tmp_path / "peace")


def test_windows_that_come_out_otherwise_are_refused_as_damage(dense: Path, sampled: Path, monkeypatch):
    from convexprune.adapters._data import calibration

    sampled_windows = calibration.sampled_windows
    cut(place_of(sampled) / "work" / "tokens.safetensors")
    monkeypatch.setattr(calibration, "sampled_windows", lambda *a, **b: sampled_windows(*a, **b | {"seed": 5}))
    with pytest.raises(errors.OutputError, match="is damaged, and the text that the model writes here is another"):
        _resumed(dense, sampled, evaluation="self", **SAMPLED)
    assert (place_of(sampled) / "work" / "layers" / "00000.json").is_file()


def test_a_refused_resume_of_a_finished_run_leaves_no_trace(dense: Path, tmp_path: Path):
    out = tmp_path / "out"
    convexprune.prune(dense, output_dir=out, **SETTINGS)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.OutputError, match="holds another run"):
        _resumed(dense, out, sparsity=0.3)
    assert sorted(tmp_path.rglob("*")) == before


def test_who_begins_where_another_works_is_told_so(tmp_path: Path):
    folder = RunFolder(tmp_path / "out")
    with folder.opened({"a": 1}, {}, None), pytest.raises(errors.OutputError, match=r"Another process .*\(process \d+"):
        RunFolder(tmp_path / "out").check(resume=False)
    with folder.staging.held() as free:
        assert free


def test_a_file_of_the_model_that_goes_into_the_result_is_part_of_the_run(dense: Path, tmp_path: Path):
    model, out = Path(shutil.copytree(dense, tmp_path / "model")), tmp_path / "out"
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(model, output_dir=out, on_progress=stop_after(1), **SETTINGS)
    (model / "generation_config.json").unlink()
    (model / "tokenizer_config.json").write_text("{ }")
    names = r"weights\.generation_config\.json \(missing now\); weights\.tokenizer_config\.json\. Go on"
    with pytest.raises(errors.OutputError, match=f"it differs in {names}"):
        _resumed(model, out)
