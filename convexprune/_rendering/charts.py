"""Figures of the page: coordinates in pixels of two small charts, and a table of operators in shades."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from convexprune.report import OperatorReport

WIDTH, HEIGHT, MARGIN = 300, 220, 52  # about the pixels of a column, so that letters are not shrunk
STEPS = (1, 2, 5)  # of an axis that covers less than two powers of ten


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    height: float
    text: str


@dataclass(frozen=True)
class Chart:
    marks: Sequence[Mark]
    across: Sequence[Mark]
    up: Sequence[Mark]
    bar: float = 0.0  # the width of a bar; 0 of points


def pairs(values: Sequence[tuple[float, float, str]]) -> Chart | None:
    """Place points on equal logarithmic axes, equal errors on the diagonal; None without two positive pairs."""
    known = [(x, y, name) for x, y, name in values if 0 < x < math.inf and 0 < y < math.inf]
    if len(known) < 2:
        return None
    ends = [v for x, y, _ in known for v in (x, y)]
    low, high = math.log10(min(ends)) - 0.08, math.log10(max(ends)) + 0.08

    def share(v: float) -> float:
        return (math.log10(v) - low) / (high - low)

    steps, powers = STEPS if high - low < 2 else (1,), range(math.floor(low), math.ceil(high) + 1)
    ticks = [v for power in powers for step in steps if low <= math.log10(v := step * 10.0**power) <= high]
    return Chart(
        [Mark(_x(share(x)), _y(share(y)), 0.0, f"{name}: {percent(x)} and {percent(y)} %") for x, y, name in known],
        [Mark(_x(share(v)), _y(0), 0.0, f"{100 * v:g} %") for v in ticks],
        [Mark(_x(0), _y(share(v)), 0.0, f"{100 * v:g} %") for v in ticks],
    )


def histogram(values: Sequence[float], bins: int, log: bool) -> Chart | None:
    """Count values in intervals of a logarithmic axis, or of one that begins at 0; None without values."""
    known = [math.log10(v) if log else v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return None
    low, high = (math.floor(min(known)), math.floor(max(known)) + 1) if log else (0.0, max(1.0, *known))
    counts = [0] * bins
    for v in known:
        counts[min(bins - 1, int(bins * (v - low) / (high - low)))] += 1
    top, bar = max(counts), (WIDTH - 2 * MARGIN) / bins
    powers, quarters = range(int(low), int(high) + 1), [i / 4 for i in range(5)]
    ticks = [(float(v), f"1e{v}") for v in powers] if log else [(v, f"{v:g}") for v in quarters]
    said = f"of {len(values)} operators"
    places = [(_x(i / bins) + 0.5, _y(n / top), n) for i, n in enumerate(counts) if n]
    return Chart(
        [Mark(x, y, _y(0) - y, f"{n} {said}") for x, y, n in places],
        [Mark(_x((v - low) / (high - low)), _y(0), 0.0, text) for v, text in ticks],
        [Mark(_x(0), _y(share), 0.0, f"{share * top:g}") for share in (0, 1)],
        bar - 1,
    )


def percent(value: float) -> str:
    return f"{100 * value:#.2g}".rstrip(".") if 0 < value < 1 else f"{100 * value:.0f}"


def _x(share: float) -> float:
    return MARGIN + share * (WIDTH - 2 * MARGIN)


def _y(share: float) -> float:
    return HEIGHT - MARGIN + share * (MARGIN / 2 - (HEIGHT - MARGIN))


SHADES = 9
PLACE = re.compile(r"(?:.*?\.)??(\d+)\.(.+)")
Value = Callable[[OperatorReport], float | None]


@dataclass(frozen=True)
class Cell:
    """The operators of a place in a layer: a single operator, or all experts."""

    value: float
    text: str
    shade: int | None  # from 0 for the least value of the table to `SHADES` - 1; None for a value that is not finite
    name: str


@dataclass(frozen=True)
class Grid:
    columns: Sequence[str]  # places in a layer, in the order of pruning
    rows: Sequence[tuple[str, Sequence[Cell | None]]]  # the name of a layer, and a cell or None for every column
    least: str
    most: str

    @property
    def cells(self) -> list[Cell]:
        return [cell for _, row in self.rows for cell in row if cell is not None]


def grid(operators: Sequence[OperatorReport], value: Value, text: Callable[[float], str], log: bool) -> Grid:
    found = defaultdict[tuple[str, str], list[float]](list)
    for o in operators:
        if (v := value(o)) is not None:
            found[place(o.name)].append(v)
    means = {where: fmean(values) for where, values in found.items()}
    shade = _shades([v for v in means.values() if math.isfinite(v)], log)
    cells = {where: Cell(v, text(v), shade(v), ".".join(where)) for where, v in means.items()}
    kinds, layers = (list(dict.fromkeys(each)) for each in zip(*cells, strict=True)) if cells else ([], [])
    rows = [(layer, [cells.get((layer, kind)) for kind in layers]) for layer in kinds]
    ends = [text(v) for v in (min(means.values()), max(means.values()))] if means else ["", ""]
    last = [kind.rpartition(".")[2] for kind in layers]
    return Grid(last if len(set(last)) == len(last) else layers, rows, *ends)


def place(name: str) -> tuple[str, str]:
    """Split an operator's name into the layer's number and the name inside the layer, shared by all experts."""
    match = PLACE.fullmatch(name)
    return (match[1], re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])) if match else ("", name)


def _shades(values: Sequence[float], log: bool) -> Callable[[float], int | None]:
    scale: Callable[[float], float] = math.log10 if log else float
    known = [scale(v) for v in values if not (log and v <= 0)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def shade(value: float) -> int | None:
        if not math.isfinite(value):
            return None
        if high == low or (log and value <= 0):
            return 0
        return min(SHADES - 1, int(SHADES * (scale(value) - low) / (high - low)))

    return shade
