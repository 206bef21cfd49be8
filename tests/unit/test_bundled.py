"""The small OPT model that comes with convexprune."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from convexprune import Moments
from convexprune._api import given
from convexprune.adapters import EMBEDDED, load, text_windows
from convexprune.constraints import Unstructured
from convexprune.pruners import Convex, LayerProblem, SparseGPT

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "prune_opt.py"


@pytest.mark.trained
def test_the_example_prunes_it_with_little_loss_on_text_that_it_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(given, "EVALUATION_SAMPLES", 4)  # to write them takes most of the time
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "12"])
    report = runpy.run_path(str(EXAMPLE), run_name="__main__")["result"].report
    assert "largest relative duality gap" in capsys.readouterr().out
    dense, pruned = (report.perplexity[name]["value"] for name in ("dense", "pruned"))
    assert report.sparsity == 0.5
    assert dense < pruned < 1.10 * dense
    assert report.largest_gap is not None and report.largest_gap <= 1e-4


def test_the_embedded_default_is_the_bundled_model():
    assert (EMBEDDED / "model.safetensors").is_file()


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    """Two pages of the documentation, as texts."""
    copies = [tmp_path / f"{name}.txt" for name in ("certificates", "method")]
    for copy in copies:
        copy.write_text((ROOT / "docs" / f"{copy.stem}.md").read_text())
    return copies


@pytest.mark.long
@torch.no_grad()
def test_few_tokens_ruin_no_operator_behind_a_relu(pages: list[Path]):
    """Four windows of 128 tokens: a weight was 791 times what it should be, and the held-out error 94."""
    model = load(EMBEDDED, device="cpu", dtype=torch.float32)
    fitted, judged = (text_windows(page, model, 128) for page in pages)
    for layer in model.model.model.decoder.layers:
        parts = [Moments(1024) for _ in range(3)]
        for tokens, moments in ((fitted[:2], parts[0]), (fitted[2:4], parts[1]), (judged[:32], parts[2])):
            hook = layer.fc2.register_forward_pre_hook(lambda _, args, own=moments: own.add(args[0]))
            model.model.base_model(input_ids=tokens, use_cache=False)
            hook.remove()
        weight = layer.fc2.weight
        problem = LayerProblem(weight, parts[0] + parts[1], Unstructured(0.5), folds=(parts[0], parts[1]))
        judge = LayerProblem(weight, parts[2], Unstructured(0.5))
        ours, swept = (pruner.prune(problem).weight for pruner in (Convex(), SparseGPT()))
        assert judge.squared_error(ours).sum() < judge.squared_error(swept).sum()
        assert float(ours.abs().max() / weight.abs().max()) < 1.5


@pytest.mark.trained
def test_no_operator_errs_more_than_by_sparsegpt_on_few_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pages: list[Path]
):
    asked = ["--tokens", "128,512,2048", "--held-out", str(pages[0]), "--held-out", str(pages[1])]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "tokens.py"), *asked])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(sys.argv[0], run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if "| convex |" in line]
    assert len(rows) == 3 and all("| 0 of 48 |" in row for row in rows), rows
