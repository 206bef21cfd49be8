"""A comparison on several samples is that on each, and says how far they agree."""

import json
import shutil
from math import exp, inf, log, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from runs import place_of
from test_compare import CALIBRATION, compared, interrupt, saved, without_times

from convexprune import errors
from convexprune.adapters import HuggingFaceModel
from convexprune.validation import _compare as each_sample
from convexprune.validation import _samples as samples
from convexprune.validation import compare_samples
from convexprune.validation._side_by_side import Comparison

METHODS: dict[str, Any] = {"methods": ["wanda", "sparsegpt"], "patterns": ["unstructured", "2:4"]}


@pytest.fixture
def folder(tiny_llama: HuggingFaceModel, tmp_path: Path) -> Path:
    return saved(tiny_llama, tmp_path)


def sampled(folder: Path, seeds: list[int], **settings: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"sparsities": [0.5], "conventions": ["own"], "eval_window": 16, "eval_windows": 3}
    plain |= {"eval_texts": [str(folder / "text.txt"), str(folder / "other.txt")], "plots": False}
    plain |= CALIBRATION | METHODS | {"dataset": "self", "max_seq_length": 24}
    return compare_samples(folder / "model", seeds, folder / "samples", **plain | settings)


def test_each_sample_is_a_comparison_and_ratios_are_geometric_means_with_their_errors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(each_sample, "draw", lambda *args: [])  # test_compare.py looks at them
    found = sampled(folder, [0, 3], command="convexprune compare ...", plots=True)
    each = []
    for seed in (0, 3):
        compared(folder, **METHODS, dataset="self", max_seq_length=24, seed=seed)
        of_sample, alone = folder / "samples" / f"seed-{seed}", (folder / "out").rename(folder / f"alone-{seed}")
        rows = [json.loads((f / "compare.json").read_text())["rows"] for f in (of_sample, alone)]
        assert without_times(rows[0]) == without_times(rows[1])
        each.append({row["name"]: row for row in rows[1]})
    assert [row["name"] for row in found["rows"]] == list(each[0])
    for row in found["rows"]:
        first = f"wanda {'2:4 pruned-own' if row['pattern'] == '2:4' else '0.5 pruned-own by row'}"
        assert row["first"] == first
        for text, of in row["texts"].items():
            kl = [(sample[row["name"]]["texts"][text]["kl"], sample[first]["texts"][text]["kl"]) for sample in each]
            logs = [log(a / b) for a, b in kl]
            assert of["kl"]["mean"] == pytest.approx(fmean([a for a, _ in kl]), rel=0.1)
            assert of["kl"]["ratio"] == pytest.approx(exp(fmean(logs)))
            assert of["kl"]["error"] == pytest.approx(stdev(logs) / 2**0.5)
            assert (of["kl"]["error"] == 0) == (row["name"] == first)
        layer = [log(s[row["name"]]["output_error"]["mean"] / s[first]["output_error"]["mean"]) for s in each]
        assert row["layer"]["ratio"] == pytest.approx(exp(fmean(layer)))
    report = (folder / "samples" / "report.md").read_text()
    drawn = [path.name for path in (folder / "samples").glob("*.png")]
    assert drawn == ["divergence-over-first.png"]
    shown = ("| wanda | 2:4 | pruned-own |", "1.000 ± 0.000", "convexprune compare ...", *drawn)
    assert all(part in report for part in shown)
    assert json.loads((folder / "samples" / "samples.json").read_text())["rows"] == found["rows"]
    assert samples.table(found).row_count == 4


def test_a_variant_that_changes_nothing_has_no_ratio(folder: Path):
    found = sampled(folder, [0, 1], methods=["magnitude"], patterns=["unstructured"], sparsities=[0.0])
    (row,) = found["rows"]
    assert row["layer"] is None and all(of["kl"] is None for of in row["texts"].values())
    assert "| magnitude | 0.0% | dense-none |" in (folder / "samples" / "report.md").read_text()


@pytest.mark.long
def test_zeros_may_depend_on_the_sample_and_a_numerical_failure_has_no_ratio(folder: Path, monkeypatch):
    real = each_sample.make_row

    def make_row(*args: Any) -> dict[str, Any]:
        row = real(*args)
        if place_of(folder / "samples").joinpath("new", "seed-0").exists():  # this is the second sample
            row["sparsity"] += 0.01  # as of an allocation of N:M patterns, which is each sample's own
            row["texts"]["other"] |= {"kl": nan, "nll": nan, "perplexity": inf}
        return row

    monkeypatch.setattr(each_sample, "make_row", make_row)
    found = sampled(folder, [0, 1], plots=True, methods=["magnitude"], patterns=["unstructured"])
    (row,) = found["rows"]
    assert row["sparsity"] == pytest.approx(0.505)
    assert row["texts"]["other"] == {"perplexity": inf, "kl": None} and row["texts"]["text"]["kl"]["ratio"] == 1
    assert "| magnitude | 50.5% | dense-none |" in (folder / "samples" / "report.md").read_text()


@pytest.mark.long
def test_interrupted_samples_go_on_and_what_does_not_belong_is_refused(folder: Path, monkeypatch):
    few: dict[str, Any] = {"patterns": ["unstructured"]}
    whole = sampled(folder, [0, 1, 2], **few)
    (folder / "samples").rename(folder / "whole")
    interrupt(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        sampled(folder, [0, 1, 2], resume=True, **few)  # nothing was begun: begin
    out = folder / "samples"
    made = place_of(out) / "new"
    assert (made / "seed-0" / "compare.json").is_file() and (place_of(made / "seed-1") / "work").is_dir()
    first = (made / "seed-0" / "compare.json").read_bytes()
    with pytest.raises(errors.OutputError, match="already holds something"):
        sampled(folder, [0, 1, 2], **few)
    shutil.rmtree(place_of(made / "seed-1"))  # as if killed before: at once, then, not after a sample
    for other in {"sparsities": [0.6]}, {"methods": ["sparsegpt", "wanda"]}:  # rows are in the order of methods
        with pytest.raises(
            errors.RecipeError, match="seed-0 holds another finished comparison; it differs in variants"
        ):
            sampled(folder, [0, 1, 2], **few | other, resume=True)
    for seeds in [0, 2], [0, 1], [2, 1, 0]:
        with pytest.raises(
            errors.RecipeError, match=r"another comparison; it differs in seed.*began with \(--seed 0,1,2\)"
        ):
            sampled(folder, seeds, resume=True, **few)
    assert without_times(sampled(folder, [0, 1, 2], resume=True, **few)) == without_times(whole)
    assert (out / "seed-0" / "compare.json").read_bytes() == first
    names = {"report.md", "samples.json", "seed-0", "seed-1", "seed-2"}
    assert {path.name for path in out.iterdir()} == names and not place_of(out).exists()
    with monkeypatch.context() as patch:  # a finished one is handed back
        patch.setattr(Comparison, "run", lambda *args: pytest.fail("it was finished"))
        assert without_times(sampled(folder, [0, 1, 2], resume=True, **few)) == without_times(whole)
    with pytest.raises(errors.RecipeError, match="samples holds another finished comparison; it differs in seed"):
        sampled(folder, [0, 1], resume=True, **few)
    with pytest.raises(errors.RecipeError, match="seed-0 holds another finished comparison; it differs in variants"):
        sampled(folder, [0, 1, 2], resume=True, **few | {"sparsities": [0.6]})
    assert not place_of(out).exists()


def test_an_interrupted_comparison_is_not_lost_to_one_of_more_or_fewer_samples(folder: Path, monkeypatch):
    out = folder / "samples"

    def one(**settings: Any) -> dict[str, Any]:
        return compared(folder, output=out, **settings)

    def several(**settings: Any) -> dict[str, Any]:
        return sampled(folder, [0, 1], **settings)

    for begin, other, seeds in (several, one, "0,1"), (one, several, "0"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, 1)
            begin()
        before = sorted(place_of(out).rglob("*"))
        with pytest.raises(errors.OutputError, match="already holds something: an interrupted comparison"):
            other()
        with pytest.raises(
            errors.RecipeError, match=rf"it differs in seed\. Give .* \(--seed {seeds}\), or another output"
        ):
            other(resume=True)
        assert sorted(place_of(out).rglob("*")) == before and len(before) > 3
        if begin is several:
            shutil.rmtree(place_of(out) / "work")  # as an older release left it
            with pytest.raises(errors.OutputError, match="an interrupted comparison"):
                other()
        shutil.rmtree(place_of(out))


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 1]])
def test_seeds_are_several_and_each_once(tmp_path: Path, seeds: list[int]):
    with pytest.raises(errors.RecipeError, match=r"give at least two, each once"):
        compare_samples(None, seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()
