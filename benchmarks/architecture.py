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
WAY = (  # of a weight: the room where something happens to it, and what
    ("adapters", "is read from its shard"),
    ("_layerwise", "its inputs are captured and add up to a Gram matrix"),
    ("pruners", "becomes a layer problem with a constraint"),
    ("solvers", "is solved, one matrix product an iteration"),
    ("core", "its duality gap is certified"),
    ("_layerwise", "is written back to its layer, with its errors and bound"),
    ("_runs", "waits in the run's folder"),
    ("adapters", "is assembled into the shards of the result"),
)


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
    figure = Figure(figsize=(11, 0.62 * len(floors) + 0.5))
    axes = figure.subplots()
    height: dict[str, float] = {}
    for number, floor in enumerate(floors):
        y = len(floors) - number
        width = 6.4 / len(floor)
        for i, room in enumerate(floor):
            lines = sum(len(path.read_text().splitlines()) for path in _files(room))
            axes.add_patch(Rectangle((i * width + 0.03, y - 0.42), width - 0.06, 0.84, fc="#eef3fb", ec="#4a6fa5"))
            axes.text(i * width + 0.12, y + 0.14, f"{room}", weight="bold", size=9, va="center")
            axes.text(
                (i + 1) * width - 0.12, y + 0.14, f"{lines:,} lines", size=7, va="center", ha="right", color="#555"
            )
            if len(floor) < 3:
                axes.text(
                    i * width + 0.12,
                    y - 0.2,
                    shorten(_said(room), 92 // len(floor) - 4, placeholder=" ..."),
                    size=7,
                    va="center",
                )
            height[room] = y
    for number, (room, what) in enumerate(WAY, 1):
        x, y = 6.55 + 0.22 * (number - 1), height[room]
        axes.plot([x], [y], "o", color="#b5532a", ms=13)
        axes.text(x, y, str(number), color="white", size=8, ha="center", va="center", weight="bold")
        if number < len(WAY):
            axes.annotate("", (x + 0.22, height[WAY[number][0]]), (x, y),
                          arrowprops={"arrowstyle": "-", "color": "#b5532a", "lw": 1.2, "zorder": 0})  # fmt: skip
        axes.text(8.45, len(floors) - 1.0 - 0.62 * (number - 1), f"{number}  {what}", size=8, va="center")
    axes.text(8.45, len(floors) - 0.3, "The way of a weight: it", size=9, weight="bold")
    axes.set_xlim(0, 11.6)
    axes.set_ylim(0.4, len(floors) + 0.6)
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "architecture.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
