"""A comparison can be interrupted, and given again: it goes on, is handed back, or is refused; nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import place_of
from test_compare import compared, folder, interrupt, without_times

from convexprune import errors
from convexprune._device import machine
from convexprune._storage.staging import Staging
from convexprune.report import finite
from convexprune.validation import _results as plots
from convexprune.validation._side_by_side import Comparison

__all__ = ["folder"]  # a fixture of test_compare


def test_an_interrupted_comparison_goes_on_to_the_same_result(folder: Path, monkeypatch):
    settings: dict[str, Any] = {"methods": ["wanda", "sparsegpt"], "conventions": ["dense", "pruned-own"]}
    whole = compared(folder, **settings)
    (folder / "out").rename(folder / "whole")
    interrupt(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        compared(folder, **settings)
    assert not (folder / "out").exists()
    with pytest.raises(errors.RecipeError, match=r"another comparison; it differs in variants"):
        compared(folder, **settings | {"sparsities": [0.6]}, resume=True)
    with pytest.raises(errors.OutputError, match="already holds something"):
        compared(folder, **settings)
    with (
        monkeypatch.context() as patch,
        pytest.raises(errors.RecipeError, match="another comparison; it differs in code"),
    ):
        patch.setattr(machine, "_own_code", lambda: "another")
        compared(folder, **settings, resume=True)
    told: list[str] = []
    resumed = compared(
        folder,
        **settings,
        resume=True,
        on_progress=lambda event: event.done and event.phase == "comparing" and told.append(event.step),
    )
    assert without_times(resumed) == without_times(whole)
    assert any("was done" in step for step in told) and len(told) == 2 * 5
    texts = [without_times(json.loads((folder / f / "compare.json").read_text())) for f in ("out", "whole")]
    assert texts[0] == texts[1]
    assert {p.name for p in (folder / "out").iterdir()} == {"compare.json", "report.md"}


def test_a_finished_comparison_is_handed_back_and_another_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    begun = compared(folder, resume=True)  # a job script may always say so
    before = (folder / "out" / "compare.json").read_bytes()
    for other in ({"sparsities": [0.6]}, {"seed": 1}, {"eval_windows": 2}, {"targets": ["q_proj"]}):
        with pytest.raises(errors.RecipeError, match=r"out holds another finished comparison; it differs in"):
            compared(folder, **other, resume=True)
    with pytest.raises(errors.OutputError, match="already holds something"):
        compared(folder)
    monkeypatch.setattr(Comparison, "run", lambda *args: pytest.fail("it was finished"))
    again = compared(folder, resume=True, command="another")
    assert again == finite(json.loads(json.dumps(begun)))
    again["rows"][0]["texts"]["text"]["kl"] = "nan"  # as JSON has a numerical failure
    assert "nan" in plots.cells(again)[1][1]
    assert (folder / "out" / "compare.json").read_bytes() == before
    assert not place_of(folder / "out").exists()


def interrupted() -> None:
    raise KeyboardInterrupt


def test_what_a_kill_after_the_last_step_left_is_removed(folder: Path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Staging, "discard", lambda self: interrupted())
        compared(folder)
    assert (place_of(folder / "out") / "work" / "identity.json").is_file()
    (folder / "out" / "report.md").write_text("mine")
    compared(folder, resume=True)
    assert not place_of(folder / "out").exists() and (folder / "out" / "report.md").read_text() == "mine"
