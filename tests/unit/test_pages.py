"""The pages: links lead somewhere, commands are understood, figures are those that were measured, sentences are short.

lab/families.md, written by `.ci/matrix`, is of today's families and refusals.
"""

import re
import runpy
import shlex
import statistics
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import typer
import yaml
from tiny_families import FAMILIES

from convexprune import _cli as cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "lab" / "families.md").read_text()
FOLDER = ROOT / "tests" / "families"
TESTS = "".join((FOLDER / f"test_{name}.py").read_text() for name in ("admission", "discovery", "checkpoint"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_was_tested_on_every_release_and_its_stages_are_shown(family: str):
    versions = re.findall(rf"^\| {re.escape(family)} \| (\d[\w.]*) \|", PAGE, re.MULTILINE)
    assert len(versions) == 4 and versions[0].startswith("4.57")
    assert len(re.findall(rf"^\| {re.escape(family)} \| .*→", PAGE, re.MULTILINE)) == 1


@pytest.mark.parametrize("what", re.findall(r"refused\(\s*\"([^\"]+)\"", TESTS))
def test_what_is_refused_is_on_the_page_with_its_message(what: str):
    assert re.search(rf"^\| {re.escape(what)} \| .+ \|$", PAGE, re.MULTILINE)


LINKS = [
    (page, link)
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "lab").glob("*.md"))
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    if not link.startswith("https://")
]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name}-{link}" for page, link in LINKS])
def test_a_link_leads_to_a_file_and_to_a_heading_in_it(page: Path, link: str):
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    assert target.exists()
    if anchor:  # as GitHub names headings
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_picture_of_the_architecture_has_every_floor():
    floors = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    rooms = [room.strip().removeprefix("convexprune.") for floor in floors for room in floor.split("|")]
    assert len(rooms) > 10 and all(f">{room}<" in picture for room in rooms)


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FIGURE = re.compile(r"(?<![\w.])\d{0,3}\.\d{2,}(?![\w.])")
FENCE = r"^```(\w*).*\n((?s:.*?))^```$"
ELSEWHERE = {"main.py", "llama.py", "prune.py", "convert_hf_to_gguf.py"}  # of other projects, or of the reader


def commands(page: Path) -> Iterator[list[str]]:
    """The commands in the blocks of a page, word by word."""
    for _, block in (each for each in re.findall(FENCE, page.read_text(), re.MULTILINE) if each[0] == "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


COMMAND = typer.main.get_command(cli.app)
OURS = [
    (page.name, words[place + 1 :])
    for page in PAGES
    for words in commands(page)
    if (place := next((i for i, word in enumerate(words) if word.rpartition("/")[2] == "convexprune"), None))
    is not None
]


@pytest.mark.parametrize(("page", "words"), OURS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(OURS)])
def test_a_command_of_a_page_is_understood(page: str, words: list[str]):
    command, name = COMMAND, ""
    while inside := getattr(command, "commands", None):
        name, *words = words
        command = inside[name]
    command.make_context(name, words)


def test_the_files_that_commands_of_pages_name_are_there():
    named = {word for page in PAGES for words in commands(page) for word in words if word.endswith((".py", ".sh"))}
    assert len(OURS) > 60 and len(named) > 5
    assert not [name for name in named - ELSEWHERE if not (ROOT / name).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_is_in_a_language_that_is_looked_at(page: Path):
    """Python is run (`test_examples.py`), commands are read (above), and YAML is; text is for people."""
    blocks = re.findall(FENCE, page.read_text(), re.MULTILINE)
    assert {language for language, _ in blocks} <= {"python", "sh", "yaml", "text"}
    assert all(yaml.safe_load(block) for language, block in blocks if language == "yaml")


@pytest.mark.parametrize("page", ["choose.md", "deploy.md", "results.md", "report.md"])
def test_figures_of_a_page_are_those_that_were_measured(page: str):
    """A number with a point stands in the tables too, so that one is not mended without the other."""
    names = ("lab/benchmarks", "docs/pack", "docs/quantize", "docs/channels")
    known = {figure for name in names for figure in FIGURE.findall((ROOT / f"{name}.md").read_text())}
    figures = set(FIGURE.findall((ROOT / "docs" / page).read_text()))
    assert figures - known <= {"0.01"}  # an example


PROSE = runpy.run_path(str(ROOT / "benchmarks" / "sentences.py"))


@pytest.mark.parametrize("page", PROSE["pages"](), ids=lambda page: page.name)
def test_sentences_are_short(page: Path):
    """Median 12 words, none of more than 30, as `python benchmarks/sentences.py` prints them."""
    lengths = [PROSE["words"](each) for each in PROSE["sentences"](page.read_text())]
    assert statistics.median(lengths) <= 12 and max(lengths) <= 30


def test_sentences_are_those_of_the_prose():
    assert len(PROSE["pages"]()) > 20
    assert PROSE["sentences"]("# A\n\nOne two. Three:\n\n- `four` five\n\n```\ncode\n```\n") == [
        "One two.",
        "Three",
        "X five",
    ]


def test_the_phases_that_benchmarks_time_are_there():
    phases = runpy.run_path(str(ROOT / "benchmarks" / "phases.py"))["PHASES"]
    assert all(hasattr(place, name) for places in phases.values() for place, name in places)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert all(f" {page.name}\n" in navigation for page in PAGES[1:])


@pytest.mark.parametrize("room", ["", ".estimators", ".problems", ".pruners", ".solvers", ".validation"])
def test_the_reference_has_every_name_that_users_import(room: str):
    page = (ROOT / "docs" / "reference.md").read_text()
    members = {name for found in re.findall(r"members: \[(.+)\]", page) for name in found.split(", ")}
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (convexprune[\w.]+)$", page, re.MULTILINE)} | members
    assert set(import_module(f"convexprune{room}").__all__) <= shown | {"solvers", "METHODS", "PRUNERS"}
