"""docs/models.md, which `.ci/matrix` writes, is of the families and refusals that are tested today."""

import re
from pathlib import Path

import pytest
from families import FAMILIES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "models.md").read_text()
TESTS = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in ("admission", "discovery", "checkpoint"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_was_tested_on_every_release_and_its_stages_are_shown(family: str):
    versions = re.findall(rf"^\| {re.escape(family)} \| (\d[\w.]*) \|", PAGE, re.MULTILINE)
    assert len(versions) == 4 and versions[0].startswith("4.57")
    assert len(re.findall(rf"^\| {re.escape(family)} \| .*→", PAGE, re.MULTILINE)) == 1


@pytest.mark.parametrize("what", re.findall(r"refused\(\s*\"([^\"]+)\"", TESTS))
def test_what_is_refused_is_on_the_page_with_its_message(what: str):
    assert re.search(rf"^\| {re.escape(what)} \| .+ \|$", PAGE, re.MULTILINE)
