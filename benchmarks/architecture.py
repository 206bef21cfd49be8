"""docs/architecture.svg: the floors of the house, and the way of a weight through them.

python benchmarks/architecture.py

The floors are those that import-linter holds (pyproject.toml), lines are counted, and what a room is for is the first
sentence of its `__init__.py`.
"""

import ast
import tomllib
from pathlib import Path
from textwrap import shorten

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parents[1]
WAY = ("adapters", "_layerwise", "pruners", "solvers", "core", "_layerwise", "_runs", "adapters")  # of a weight


def _rooms() -> list[list[str]]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [
        [name.strip().removeprefix("convexprune.") for name in floor.split("|")] for floor in contracts[0]["layers"]
    ]


def _files(room: str) -> list[Path]:
    place = ROOT / "convexprune" / room.replace(".", "/")
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def _said(room: str) -> str:
    place = ROOT / "convexprune" / room.replace(".", "/")
    text = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]


def main() -> None:
    """Draw."""
    floors = _rooms()
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "convexprune", "font.family": "sans-serif"}
    figure = Figure(figsize=(8, 0.5 * len(floors)))
    axes = figure.subplots()
    height: dict[str, float] = {}
    for number, floor in enumerate(floors):
        y = len(floors) - number
        width = 6.2 / len(floor)
        for i, room in enumerate(floor):
            left, right = i * width + 0.1, (i + 1) * width - 0.1
            lines = sum(len(path.read_text().splitlines()) for path in _files(room))
            axes.add_patch(Rectangle((left - 0.07, y - 0.44), width - 0.06, 0.88, fc="#eef3fb", ec="#4a6fa5"))
            axes.text(left, y + 0.17, room, weight="bold", size=9.5, va="center")
            axes.text(right, y + 0.17, f"{lines:,} lines", size=8, va="center", ha="right", color="#555")
            if len(floor) < 3:
                said = shorten(_said(room).replace("`", ""), 79 // len(floor) - 4, placeholder=" ...")
                axes.text(left, y - 0.21, said, size=8, va="center")
            height[room] = y
    for number, room in enumerate(WAY, 1):
        x, y = 6.2 + 0.23 * number, height[room]
        axes.plot([x], [y], "o", color="#b5532a", ms=14)
        axes.text(x, y, str(number), color="white", size=9, ha="center", va="center", weight="bold")
        if number < len(WAY):
            axes.plot([x, x + 0.23], [y, height[WAY[number]]], color="#b5532a", lw=1.2, zorder=0)
    axes.set_xlim(0, 8.2)
    axes.set_ylim(0.4, len(floors) + 0.6)
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "architecture.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
