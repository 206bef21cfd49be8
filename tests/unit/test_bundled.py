"""The small OPT model that comes with convexprune."""

import runpy
import sys
from pathlib import Path

import pytest

from convexprune._api import windows
from convexprune.adapters import EMBEDDED

EXAMPLE = Path(__file__).parents[2] / "examples" / "prune_opt.py"


@pytest.mark.trained
def test_the_example_prunes_it_with_little_loss_on_text_that_it_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(windows, "EVALUATION_SAMPLES", 4)  # to write them takes most of the time
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "12"])
    report = runpy.run_path(str(EXAMPLE), run_name="__main__")["result"].report
    assert "largest relative duality gap" in capsys.readouterr().out
    dense, pruned = (report.perplexity[name]["value"] for name in ("dense", "pruned"))
    assert report.sparsity == 0.5
    assert dense < pruned < 1.10 * dense
    assert report.largest_gap is not None and report.largest_gap <= 1e-4


def test_the_embedded_default_is_the_bundled_model():
    assert (EMBEDDED / "model.safetensors").is_file()
