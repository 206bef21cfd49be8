"""The small OPT model that comes with convexprune."""

from pathlib import Path

import pytest

import convexprune
from convexprune._api import windows
from convexprune.adapters import EMBEDDED


def test_the_bundled_model_is_pruned_with_little_loss_on_text_that_it_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(windows, "EVALUATION_SAMPLES", 8)  # to write them takes most of the time
    result = convexprune.prune(num_calibration_samples=16, evaluation="self", output_dir=tmp_path / "out", bound_rows=0)
    dense, pruned = (result.report.perplexity[name]["value"] for name in ("dense", "pruned"))
    assert result.report.sparsity == 0.5
    assert dense < pruned < 1.10 * dense
    assert result.report.largest_gap is not None and result.report.largest_gap <= 1e-4


def test_the_embedded_default_is_the_bundled_model():
    assert (EMBEDDED / "model.safetensors").is_file()
