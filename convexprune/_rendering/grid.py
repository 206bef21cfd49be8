"""A table of operators: a row for a decoder layer, a column for a place in the layer, a shade for a value."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from convexprune.report import OperatorReport

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
    return Grid(_shortened(layers), rows, *ends)


def place(name: str) -> tuple[str, str]:
    """Split an operator's name into the layer's number and the name inside the layer, shared by all experts."""
    match = PLACE.fullmatch(name)
    return (match[1], re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])) if match else ("", name)


def _shortened(kinds: Sequence[str]) -> list[str]:
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(last) else list(kinds)


def _shades(values: Sequence[float], log: bool) -> Callable[[float], int | None]:
    scale = _logarithm if log else float
    known = [scale(v) for v in values if not (log and v <= 0)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def shade(value: float) -> int | None:
        if not math.isfinite(value):
            return None
        if high == low or (log and value <= 0):
            return 0
        return min(SHADES - 1, int(SHADES * (scale(value) - low) / (high - low)))

    return shade


def _logarithm(value: float) -> float:
    return math.log10(value)
