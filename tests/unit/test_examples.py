"""Every example and every Python block of the README and of docs/finetune.md runs."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from convexprune._api import windows
from convexprune.adapters._data import calibration

ROOT = Path(__file__).parents[2]
ARGUMENTS = {"prune_opt.py": ["8"]}
BLOCKS = [
    (page, block)
    for page in ("README.md", "docs/finetune.md")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]


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


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # the Trainer does, on a CPU too
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}{i}" for i, (page, _) in enumerate(BLOCKS)])
def test_the_block_of_the_page_runs(page: str, block: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page, "exec"), {})


def test_the_pages_have_blocks():
    assert [page for page, _ in BLOCKS].count("docs/finetune.md") == 3 and len(BLOCKS) >= 5
