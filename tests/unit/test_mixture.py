"""A data set of several parts: each gives its share of the samples, and so has any beginning of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import require_resumed

import convexprune
from convexprune._api.given import name_of_text
from convexprune.adapters import HuggingFaceModel, calibration_and_held_out, check_dataset
from convexprune.adapters._data.sources import apportioned, interleaved, needs_sampling, parts_of
from convexprune.errors import CalibrationError
from convexprune.validation import verify

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom and of foolishness. " * 40
LICENCE = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. " * 40


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "prose.txt", tmp_path / "licence.txt"
    for path, text in zip(paths, (PROSE, LICENCE), strict=True):
        path.write_text(text)
    return paths


@given(st.integers(1, 300), st.lists(st.floats(0.01, 10), min_size=1, max_size=5))
def test_every_part_gives_its_share_but_for_rounding(count: int, shares: list[float]):
    parts = [(str(i), share / sum(shares)) for i, share in enumerate(shares)]
    counts = apportioned(count, parts)
    assert sum(counts) == count
    assert all(abs(got - share * count) < 1 for got, (_, share) in zip(counts, parts, strict=True))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_any_beginning_has_about_the_shares_of_the_whole(counts: list[int]):
    windows = interleaved([torch.full((n, 2), i) for i, n in enumerate(counts)])
    assert windows.shape == (sum(counts), 2)
    for i, n in enumerate(counts):
        so_far = (windows[:, 0] == i).cumsum(0)
        expected = torch.arange(1, len(windows) + 1) * n / max(1, len(windows))
        assert bool(((so_far - expected).abs() <= len(counts)).all())


def test_names_and_shares(texts: tuple[Path, Path], tmp_path: Path):
    prose, licence = map(str, texts)
    assert parts_of(f"{prose}:0.75, self:0.25") == [(prose, 0.75), ("self", 0.25)]
    assert parts_of(f"{prose},{licence}") == [(prose, 0.5), (licence, 0.5)]
    assert parts_of(f"{prose}:3,{licence}:1") == [(prose, 0.75), (licence, 0.25)]
    assert [needs_sampling(text) for text in ("self", f"{prose},self:0.5"[:-4], prose, texts[0])] == [
        True,
        True,
        False,
        False,
    ]
    (odd := tmp_path / "a,b:1.txt").write_text(PROSE)
    assert parts_of(str(odd)) == [(str(odd), 1.0)]
    assert name_of_text(f"{prose},self") == f"{prose}:0.5,self:0.5"


REFUSED = {
    "{0}:0.5,self": "all parts",
    "{0}:0,self:1": "above 0",
    "{0},{0}": "twice",
    "{0},": "is empty",
    ":1,{0}:1": "is empty",
    "{0}#body": "text without fields",
    "{0}#body,self": "text without fields",
    "{0},nowhere.txt": "nowhere",
    "{0},c5": "c5",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_other_mixtures_are_refused(texts: tuple[Path, Path], asked: str):
    with pytest.raises(CalibrationError, match=REFUSED[asked]):
        check_dataset(asked.format(*texts))


def test_windows_are_those_of_the_parts(tiny_opt: HuggingFaceModel, texts: tuple[Path, Path]):
    settings: dict[str, Any] = {"max_seq_length": 16, "seed": 0}
    fitted, held_out = calibration_and_held_out(
        f"{texts[0]}:0.75,{texts[1]}:0.25", tiny_opt, num_samples=8, spare=4, **settings
    )
    prose = calibration_and_held_out(str(texts[0]), tiny_opt, num_samples=6, spare=3, **settings)
    licence = calibration_and_held_out(str(texts[1]), tiny_opt, num_samples=2, spare=1, **settings)
    for mixed, parts in ((fitted, (prose[0], licence[0])), (held_out, (prose[1], licence[1]))):
        assert sorted(map(tuple, mixed.tolist())) == sorted(tuple(row) for part in parts for row in part.tolist())
    with pytest.raises(CalibrationError, match="gives none"):
        calibration_and_held_out(f"{texts[0]}:0.99,self:0.01", tiny_opt, num_samples=8, spare=0, **settings)


def test_a_run_on_a_mixture_is_resumed_and_verified(
    tiny_llama: HuggingFaceModel, texts: tuple[Path, Path], tmp_path: Path
):
    tiny_llama.model.save_pretrained(tmp_path / "model")
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    run = {"dataset": f"{texts[0]},self", "num_calibration_samples": 4, "max_seq_length": 16, "method": "magnitude"}
    require_resumed(tmp_path / "model", tmp_path, **run)
    report = convexprune.prune(tmp_path / "model", output_dir=tmp_path / "again", resume=True, **run).report
    assert report.recipe["dataset"] == f"{texts[0]}:0.5,self:0.5"
    assert verify(tmp_path / "again", rows=1, columns=4, sample=1, bound_rows=1).errors
