"""The page of a run: whole without a network, nothing from outside is markup, and it can be looked at."""

import json
import math
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from runs import SETTINGS, TOKENS
from test_card import HOSTILE, hostile
from typer.testing import CliRunner

import convexprune
from convexprune import _cli as cli
from convexprune import errors
from convexprune._rendering.charts import SHADES, grid, histogram, pairs, percent, place
from convexprune._rendering.facts import costs, facts
from convexprune._rendering.page import page
from convexprune.report import OperatorReport, Report

KNOWN = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "h1", "h2", "p", "ul", "li", "b",
    "i", "span", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "svg", "line", "text",
    "rect", "circle", "figcaption", "code", "pre", "details", "summary", "wbr",
}  # fmt: skip
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    settings: dict[str, Any] = SETTINGS | {"bound_rows": 1, "allocation": "owl"}
    convexprune.prune(dense, output_dir=folder, evaluation=TOKENS, **settings)
    return folder


def _report(folder: Path) -> Report:
    return Report.from_json((folder / "report.json").read_text())


class Seen(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts = list[str](), list[tuple[str, str | None]](), list[str]()
        self.open = list[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "line", "circle", "i") or self.get_starttag_text() == f"<{tag}>":
            self.open += [] if tag == "meta" else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))


def test_every_result_has_a_page_that_says_what_the_report_says(run: Path):
    report, text = _report(run), (run / "report.html").read_text()
    assert text == page(report)
    texts = Seen(text).texts
    for fact in (*facts(report), *costs(report)):
        assert fact.name in texts and fact.text in texts, fact
    for o in report.operators:
        assert o.name in texts
    dense, pruned = (report.perplexity[name]["value"] for name in ("dense", "pruned"))
    assert f"{dense:.2f} → {pruned:.2f}" in texts and "recipe.yaml" not in texts
    assert f"convexprune verify {run}" in texts


def test_it_needs_no_network_and_runs_nothing(run: Path):
    text = (run / "report.html").read_text()
    seen = Seen(text)
    assert not {"script", "link", "img", "iframe", "object", "a", "form"} & set(seen.tags)
    assert not {name for name, _ in seen.attributes if name in ("src", "href", "srcset") or name.startswith("on")}
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in seen.attributes


def test_names_from_outside_are_no_markup():
    text = page(hostile())
    seen = Seen(text)
    assert "script" not in seen.tags and "<script>" not in text
    assert set(seen.tags) <= KNOWN and not {name for name, _ in seen.attributes if name.startswith("on")}
    assert " ".join(HOSTILE.split()) in seen.texts  # the name of an operator, a warning, ...


def _with(report: Report, **changes: Any) -> Report:
    return replace(report, operators=[replace(o, **changes) for o in report.operators])


@pytest.mark.parametrize(
    "changes",
    [
        {"relative_error": math.nan}, {"held_out_error": math.inf}, {"held_out_error": None}, {"relative_error": 0.0},
        {"gap": None, "bound": None}, {"name": "same"}, {"held_out_error": 5.0}, {"gap": 0.0}, {"gap": math.inf},
    ],
)  # fmt: skip
def test_there_is_a_page_of_whatever_came_out(run: Path, changes: dict[str, Any]):
    report = _with(_report(run), **changes)
    assert Seen(page(report)).open == Seen(page(_report(run))).open
    one = replace(report, operators=report.operators[:1], perplexity={}, memory={}, bytes=None, warnings=["a", "b"])
    assert "a" in Seen(page(one)).texts
    assert "Each operator has the same share of zeros" in page(one)


def test_the_page_of_an_older_report_or_of_a_pack_is_written(run: Path):
    old = Report(_report(run).recipe, {}, {}, _report(run).operators)
    assert "convexprune pack DIR PACK" in page(old)
    packed = replace(old, packed={"before": 2e9, "after": 1e6, "bits": 5.5}, bytes=10**6)
    assert "1.0 MB, packed from 2.00 GB" in page(packed) and "convexprune unpack DIR MODEL" in page(packed)


def test_the_page_of_a_result_packed_later_tells_its_sizes_and_how_to_unpack_it(run: Path, tmp_path: Path):
    packed = convexprune.pack(run, tmp_path / "pack")
    result = CliRunner().invoke(cli.app, ["report", str(packed.output_dir), "--output", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.html").read_text()
    assert f"convexprune unpack {packed.output_dir} MODEL" in text and "convexprune eval" not in text
    assert f"{packed.operator_bits:.2f} of the operators, {packed.bits:.2f} of all" in text


def test_embedding_and_head_on_a_grid_are_told(run: Path):
    told = next(fact for fact in facts(replace(_report(run), ends={"lm_head": "int8"})) if "head" in fact.name)
    assert told.text.startswith("lm_head int8, by descent")
    assert not any("head" in fact.name for fact in facts(_report(run)))


def test_who_asked_for_no_zeros_is_shown_none(run: Path):
    text = page(_with(_report(run), expected_zeros=0))
    assert "Who has the zeros" in page(_report(run)) and "Who has the zeros" not in text


def test_the_command_writes_it_again(run: Path, tmp_path: Path):
    moved = shutil.copytree(run, tmp_path / "moved here")
    result = CliRunner().invoke(cli.app, ["report", str(moved)])
    assert result.exit_code == 0 and "report.html" in result.output
    assert f"convexprune verify '{moved}'" in Seen((moved / "report.html").read_text()).texts
    result = CliRunner().invoke(cli.app, ["report", str(run), "--output", str(tmp_path / "page.html")])
    assert result.exit_code == 0 and (tmp_path / "page.html").read_text() == page(_report(run))
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path / "none")])
    assert "report.json" in str(result.exception) and "Make it" not in str(result.exception)
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path / "empty")])
    assert isinstance(result.exception, errors.OutputError) and not list((tmp_path / "empty").iterdir())


def _operator(name: str, error: float) -> OperatorReport:
    return OperatorReport(name, 2, 2, 2, 2, "x", error, None, None, None, None, None, 0, 0, {}, 1, 0, 0.0)


def test_layers_are_rows_and_experts_share_a_cell():
    names = ["model.layers.0.mlp.experts.0.up", "model.layers.0.mlp.experts.1.up", "model.layers.10.attn.q", "head"]
    table = grid(
        [_operator(name, 0.1 * 10**i) for i, name in enumerate(names)], lambda o: o.relative_error, percent, True
    )
    assert table.columns == ["up", "q", "head"] and [row[0] for row in table.rows] == ["0", "10", ""]
    (first, *_), (_, second, _), (*_, third) = (cells for _, cells in table.rows)
    assert first and second and third and (first.value, first.shade) == (0.55, 0) and third.shade == SHADES - 1
    assert [cell.name for cell in table.cells] == ["0.mlp.experts.*.up", "10.attn.q", ".head"]
    assert place("transformer.h.3.attn.c_attn") == ("3", "attn.c_attn")


def test_charts_put_marks_where_values_are():
    chart = pairs([(0.01, 0.01, "a"), (0.1, 0.1, "b"), (0.1, 0.4, "c"), (0.0, 1.0, "zero"), (math.nan, 1.0, "nan")])
    assert chart is not None and len(chart.marks) == 3
    a, b, c = chart.marks
    assert a.x < b.x == c.x and a.y > b.y > c.y and "1 %" in [tick.text for tick in chart.across]
    bars = histogram([0.1, 0.11, 0.9, math.nan], 10, log=False)
    assert bars is not None and [mark.text[0] for mark in bars.marks] == ["2", "1"]
    assert bars.marks[0].height == 2 * bars.marks[1].height
    assert pairs([(1.0, 1.0, "alone")]) is None and histogram([0.0, math.inf], 10, log=True) is None
    assert [percent(v) for v in (0.0, 0.00123, 0.05, 0.5, 3.0)] == ["0", "0.12", "5.0", "50", "300"]


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1100),
        ("dark", 400),
        pytest.param("light", 400, marks=pytest.mark.slow),
        pytest.param("dark", 1100, marks=pytest.mark.slow),
    ],
)
def test_it_can_be_looked_at(run: Path, tmp_path: Path, scheme: str, width: int):
    """The page has its colours, something on it, and nothing that is wider than the window."""
    report = _report(run)
    report.operators = [replace(o, name=o.name.replace("layers.", "layers.1")) for o in report.operators]
    (tmp_path / "page.html").write_text(page(report))
    assert BROWSER is not None
    chosen = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        chosen,
        f"--window-size={width},3000",
    ]
    place = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    command = [BROWSER, *flags, *place, (tmp_path / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shown = np.asarray(imread(tmp_path / "page.png"))[:, :, :3]
    assert shown.shape[1] == width
    background = shown[2, 2]
    assert background.mean() > 0.9 if scheme == "light" else background.mean() < 0.15
    assert np.abs(shown[:, -12:] - background).max() < 0.02  # the margin is free: nothing overflows
    assert len(np.unique((255 * shown).astype(int) @ [65536, 256, 1])) > 50  # text, tables, shades


def test_the_page_says_how_many_operators_it_leaves_out(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("convexprune._rendering.page.LISTED", 3)
    assert "The worst 3 of 28 operators; report.json has all" in page(_report(run))
    assert json.loads((run / "report.json").read_text())["bytes"] > 0
