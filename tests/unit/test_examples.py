"""Every example and every Python block of the README runs."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from convexprune._api import windows
from convexprune.adapters._data import calibration

ROOT = Path(__file__).parents[2]
ARGUMENTS = {"prune_opt.py": ["8"]}
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bundled model writes, to be pruned on and judged by, is short: that took most of the time."""
    write = calibration.sampled_windows
    monkeypatch.setattr(calibration, "sampled_windows", lambda *a, **b: write(*a, **b | {"length": 64}))
    monkeypatch.setattr(windows, "EVALUATION_SAMPLES", 4)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_the_example_runs(path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.name, [])])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_the_block_of_the_readme_runs(block: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_the_readme_has_blocks():
    assert len(BLOCKS) >= 2
