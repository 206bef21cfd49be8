"""A comparison says what pruning each method by itself would have said, and can be interrupted."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import convexprune
from convexprune import errors
from convexprune.adapters import HuggingFaceModel, load, text_windows
from convexprune.pruners import SparseGPT
from convexprune.validation import _compare as door
from convexprune.validation import _results as plots
from convexprune.validation import compare, perplexity
from convexprune.validation._results import _point, will_draw
from convexprune.validation._side_by_side import Comparison
from convexprune.validation._variants import CONVENTIONS, make_variants

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 60
OTHER = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. " * 60
TOKENS = torch.randint(2, 4000, (5, 24), generator=torch.Generator().manual_seed(0))
CALIBRATION: dict[str, Any] = {"dataset": TOKENS, "num_calibration_samples": 4, "held_out_samples": 1}
TIMES = {"solve_seconds", "seconds", "shared_seconds", "peak_bytes", "more_bytes"}


@pytest.fixture
def folder(tiny_llama: HuggingFaceModel, tmp_path: Path) -> Path:
    return saved(tiny_llama, tmp_path)


def saved(model: HuggingFaceModel, tmp_path: Path) -> Path:
    model.model.save_pretrained(tmp_path / "model")
    assert model.tokenizer is not None
    model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(OTHER)
    return tmp_path


def compared(folder: Path, **settings: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "methods": ["fista"],
        "sparsities": [0.5],
        "patterns": ["unstructured"],
        "conventions": ["own"],
        "eval_texts": [str(folder / "text.txt"), str(folder / "other.txt")],
        "eval_window": 16,
        "eval_windows": 3,
        "plots": False,
        "output": folder / "out",
    }
    return compare(folder / "model", **plain | CALIBRATION | settings)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Once, before texts go through a layer once more."""
    advance, steps = Comparison._through_texts, count()

    def breaks(self, *args):
        if next(steps) == step:
            raise KeyboardInterrupt
        return advance(self, *args)

    monkeypatch.setattr(Comparison, "_through_texts", breaks)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_perplexities_and_errors_are_those_of_prune(
    build: Callable[[str], PreTrainedModel], tokenizer, tmp_path: Path, family: str
):
    folder = saved(HuggingFaceModel(build(family), tokenizer), tmp_path)
    conventions = ["dense", "dense-none", "dense-layer", "pruned-layer"]
    result = compared(folder, methods=["fista", "sparsegpt"], conventions=conventions, batch_size=2)
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        prefix, correction, target = CONVENTIONS[row["convention"]]
        model = load(folder / "model", device="cpu")
        method: dict[str, Any] = {"solver": "fista"} if row["method"] == "fista" else {"method": "sparsegpt"}
        settings = CALIBRATION | method | {"prefix": prefix, "error_correction": correction, "error_target": target}
        settings |= {"batch_size": 2, "bound_rows": 0}
        pruned = convexprune.prune(model.model, **settings)
        for name in ("text", "other"):
            expected = perplexity(model.model, text_windows(folder / f"{name}.txt", model, 16)[:3])
            assert row["texts"][name]["perplexity"] == pytest.approx(expected.value, rel=1e-5)
        assert [o["relative_error"] for o in row["operators"]] == pytest.approx(
            [o.relative_error for o in pruned.report.operators], rel=1e-4
        )
        assert row["sparsity"] == pruned.report.sparsity == 0.5
        leaders = [o for o in pruned.report.operators if not o.name.endswith(("k_proj", "v_proj", "up_proj"))]
        assert row["products"] == pytest.approx(sum(o.products for o in leaders) / len(leaders))


def test_the_dense_models_numbers_are_its_own_and_its_kl_to_itself_is_zero(folder: Path):
    result = compared(folder, methods=["magnitude"])
    model = load(folder / "model", device="cpu")
    windows = text_windows(folder / "text.txt", model, 16)[:3]
    dense = result["dense"]["texts"]["text"]
    assert dense["perplexity"] == pytest.approx(perplexity(model.model, windows).value, rel=1e-6)
    assert dense["kl"] == dense["excess"] == 0 and set(dense["kl_by_window"]) == {0.0}
    (row,) = result["rows"]
    with torch.no_grad():
        before = model.model(windows).logits[:, :-1].double().log_softmax(-1)
        convexprune.prune(model.model, method="magnitude", **CALIBRATION)
        after = model.model(windows).logits[:, :-1].double().log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    assert row["texts"]["text"]["kl"] == pytest.approx(expected.item(), rel=1e-4)


def test_logits_of_hidden_states_are_the_models_own_whatever_the_family(tiny: HuggingFaceModel):
    windows = TOKENS[:2]
    last = tiny.layers[-1].module
    kept: list[Any] = []
    hook = last.register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        expected = tiny.model(windows).logits
    hook.remove()
    hidden = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
    assert torch.equal(tiny.logits(windows, hidden), expected)
    with torch.no_grad():
        assert torch.equal(tiny.model(windows).logits, expected)  # and the model is what it was


@pytest.mark.long
def test_a_row_is_the_same_whatever_stands_beside_it(folder: Path):
    settings: dict[str, Any] = {"methods": ["fista", "alps"], "conventions": ["dense", "dense-layer", "pruned-layer"]}
    together = compared(folder, **settings, patterns=["unstructured", "2:4"])
    some = together["rows"][::5]
    assert [len({row[name] for row in some}) for name in ("method", "pattern", "convention")] == [2, 2, 3]
    for row in some:
        own = {f"{name}s": [row[name]] for name in ("method", "pattern", "convention")}
        alone = compared(folder, **own, output=folder / "alone" / row["name"])
        assert without_times(alone["rows"]) == without_times([row])
        assert alone["dense"] == together["dense"]


@pytest.mark.parametrize("pattern", ["unstructured", "columns", "channels", "2:4"])
def test_every_share_is_a_point_of_its_own(pattern: str):
    row = {"pattern": pattern, "method": "m", "allocation": "uniform", "quota": "matrix", "convention": "dense-layer"}
    shares = [0.25, 0.5, 0.502, 0.504] if pattern != "2:4" else [0.5]
    points = [_point(row | {"asked_sparsity": share, "sparsity": share}) for share in shares]
    assert len({point["target"] for point in points}) == len(shares)
    assert {point["kind"] for point in points} == {"N:M" if pattern == "2:4" else pattern}


@pytest.mark.long
def test_report_and_plots_are_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(door, "shortage", lambda tokens, widest: f"{tokens.numel()} tokens, {widest} inputs")
    result = compared(folder, methods=["wanda", "fista"], patterns=["unstructured", "2:4"], plots=True)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == ["96 tokens, 48 inputs"]
    report = (folder / "out" / "report.md").read_text()
    assert "| wanda | 2:4 | pruned-own |" in report and "| fista, rows | 50.0% | dense-layer |" in report
    drawn = {p.name for p in (folder / "out").glob("*.png")}
    against = {f"{what}-against-sparsity.png" for what in ("error", "kl", "perplexity")}
    assert len(drawn) == 6 and against < drawn and all(name in report for name in drawn)
    assert result["card"]["hashes"]["model"] in report
    wanda, fista = (row for row in result["rows"] if row["pattern"] == "2:4")
    assert wanda["products"] == 0 < fista["products"]
    assert fista["largest_gap"] < 1e-2 and wanda["largest_gap"] is None


BAD = {
    "method": ({"methods": ["fista", "wando"]}, errors.RecipeError, "Did you mean 'wanda'"),
    "convention": ({"conventions": ["densely"]}, errors.RecipeError, "Did you mean 'dense'"),
    "pattern": ({"patterns": ["2-4"]}, errors.PatternError, "Unknown pattern '2-4'"),
    "sparsity": ({"sparsities": [1.5]}, errors.PatternError, "outside"),
    "setting": ({"methods": ["sparsegpt:dampin=1"]}, errors.RecipeError, "dampin"),
    "text": ({"eval_texts": ["python-doc"]}, errors.CalibrationError, "Did you mean 'python-docs'"),
    "texts": ({"eval_texts": ["a/python-docs", "b/python-docs"]}, errors.RecipeError, "no two with the same file name"),
    "no text": ({"eval_texts": []}, errors.RecipeError, "give one or more"),
    "nothing": ({"methods": []}, errors.RecipeError, "nothing to compare"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(tmp_path: Path, case: str):
    settings, error, message = BAD[case]
    with pytest.raises(error, match=message):
        compared(tmp_path, **{"eval_texts": ["licences"], **settings})
    assert list(tmp_path.iterdir()) == []


def test_fewer_samples_held_out_than_asked_for_are_refused(folder: Path):
    with pytest.raises(errors.CalibrationError, match="1 windows left after 4 for calibration; held_out_samples=2"):
        compared(folder, held_out_samples=2)


def test_names_stand_for_methods_solvers_and_settings():
    variants = make_variants(["fista", "sparsegpt:damping=0.1"], [0.5, 0.7], ["unstructured", "2:4"], ["own", "dense"])
    assert [v.name for v in variants if v.pattern == "2:4"] == [
        "fista 2:4 dense-layer",
        "fista 2:4 dense",
        "sparsegpt:damping=0.1 2:4 pruned-own",
        "sparsegpt:damping=0.1 2:4 dense",
    ]
    assert len(variants) == 12
    pruner = variants[-1].layer_settings().pruner
    assert isinstance(pruner, SparseGPT) and pruner.damping == 0.1


def test_shares_that_are_near_each_other_have_names_of_their_own():
    assert len({v.name for v in make_variants(["wanda"], [0.995, 0.9952], ["unstructured"], ["own"])}) == 2


def test_a_method_may_name_its_own_convention_and_allocation():
    methods = ["fista", "fista:convention=pruned-layer:rounds=20:allocation=uniform", "alps", "alps:allocation=rows"]
    assert [v.name for v in make_variants(methods, [0.5], ["unstructured"], ["own"])] == [
        "fista 0.5 dense-layer rows",
        "fista:rounds=20 0.5 pruned-layer",
        "alps 0.5 pruned-own",
        "alps 0.5 pruned-own rows",
    ]
    for pattern, quota, own in (
        ("unstructured", "matrix", "rows"),
        ("unstructured", "row", "uniform"),
        ("2:4", "matrix", "uniform"),
    ):
        (variant,) = make_variants(["admm"], [0.5], [pattern], ["own"], quota)
        assert variant.allocation == own == variant.recipe().allocation
    with pytest.raises(errors.RecipeError, match=r"Unknown convention 'pruned-lair'\. Did you mean 'pruned-layer'"):
        make_variants(["alps:convention=pruned-lair"], [0.5], ["unstructured"], ["own"])


def test_plots_are_drawn_where_there_is_something_to_draw_with(monkeypatch: pytest.MonkeyPatch):
    assert will_draw(None) and will_draw(True) and not will_draw(False)
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    assert not will_draw(None)
    with pytest.raises(errors.DependencyError, match=r"pip install matplotlib seaborn, or ask for none \(--no-plots\)"):
        will_draw(True)


@pytest.mark.parametrize(("pattern", "share", "line"), [("channels:8", 1 / 3, "33.3%"), ("heads", 0.5, "50.0%")])
def test_where_something_is_removed_only_what_reads_it_is_pruned(folder: Path, pattern: str, share: float, line: str):
    found = compared(folder, methods=["wanda"], patterns=[pattern], sparsities=[share])
    assert [row["sparsity"] for row in found["rows"]] == [pytest.approx(share)]
    assert f"| wanda | {pattern} {line} |" in (folder / "out" / "report.md").read_text()
    for other in "2:4", "channels:16" if pattern == "heads" else "heads":
        with pytest.raises(errors.RecipeError, match="compare it with no other pattern"):
            compared(folder, patterns=[pattern, other], output=folder / "no")


def test_quantizers_are_compared_as_they_quantize_alone(folder: Path):
    methods = ["gptaq:quantize=int4:group_size=-1", "qep:quantize=int4:group_size=-1", "descent:bits=4"]
    methods += ["descent:quantize=int4:group_size=-1:beam=1"]
    rows = compared(folder, methods=methods, sparsities=[0])["rows"]
    grid: dict[str, Any] = {"quantize": "int4", "group_size": -1}
    alone = [grid | {"quantizer": "gptaq"}, grid | {"quantizer": "qep"}, {"bits": 4.0}]
    alone += [grid | {"quantizer_args": {"beam": 1}}]
    for row, settings in zip(rows, alone, strict=True):
        model = load(folder / "model", device="cpu")
        found = convexprune.prune(model.model, sparsity=0, bound_rows=0, **CALIBRATION, **settings)
        errors = {o.name: o.relative_error for o in found.report.operators}
        assert {o["name"]: o["relative_error"] for o in row["operators"]} == pytest.approx(errors, rel=1e-4)


def test_a_quantizer_without_bits_is_refused(folder: Path):
    with pytest.raises(
        errors.RecipeError, match=r"'gptq': a quantizer needs a number of bits, as in gptq:quantize=int4"
    ):
        compared(folder, methods=["gptq"], sparsities=[0])
