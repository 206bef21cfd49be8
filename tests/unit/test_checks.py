"""Every line of `.ci/checks` fails on a tree with the fault that it is for, and passes without."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = [line for line in (ROOT / ".ci" / "checks").read_text().splitlines() if line.startswith(".venv/bin/")]
CONFIGURATION = ("pyproject.toml", "mkdocs.yml", ".gitignore")
SMALL = {"a.py": '"""A module."""\n'}
FAULTS: dict[str, dict[str, str]] = {
    "ruff check": SMALL | {"b.py": '"""An import too many."""\n\nimport os\n'},
    "ruff format": SMALL | {"b.py": '"""Badly set."""\n\nA = [1,2]\n'},
    "codespell": SMALL | {"b.md": f"It is {chr(116)}eh end.\n"},
    "pyright": SMALL | {"adapters/b.py": 'A: int = "text"\n'},
    "lint-imports": {"adapters/b.py": "import convexprune._api.calls\n"},
    "towncrier build": {"changelog.d/+b.mended.md": "A kind that there is not.\n"},
    "mkdocs build": {"docs/index.md": "A [page](nowhere.md) that is not there.\n"},
}


def tree(folder: Path, check: str) -> None:
    """What a check looks at: a few small files, or all of the package or the docs."""
    for name in CONFIGURATION:
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    rooms = {"lint-imports": ("convexprune", "adapters", "validation"), "towncrier build": ("changelog.d",)}
    rooms["mkdocs build"] = (*rooms["lint-imports"], "docs", "benchmarks")
    for room in rooms.get(check, ()):
        shutil.copytree(ROOT / room, folder / room, symlinks=True, ignore=shutil.ignore_patterns("data", "__pycache__"))
    write(folder, SMALL if check not in rooms else {"CHANGELOG.md": "<!-- releases -->\n"})


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def passes(line: str, folder: Path) -> bool:
    command = shlex.split(line)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    print(done.stdout, done.stderr)
    return done.returncode == 0


def test_every_check_has_its_fault():
    assert len(LINES) == len(FAULTS) and all(any(f"/{name}" in line for line in LINES) for name in FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("check", FAULTS)
def test_a_check_fails_on_a_fault_alone(check: str, tmp_path: Path):
    (line,) = (line for line in LINES if f"/{check}" in line)
    tree(tmp_path, check)
    assert passes(line, tmp_path)
    write(tmp_path, FAULTS[check])
    assert not passes(line, tmp_path)
