"""docs/models.md, written by `.ci/matrix`, is of today's families and refusals; links between pages lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest
from tiny_families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()
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
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
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
