"""Operators as a table: a row for each decoder layer, a column for each place in it, a shade for each value."""

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
    """The operators of one place in one layer: one, or all experts there.

    Args:
        shade: from 0, the least of the table, to `SHADES` - 1; None if the value is not finite.
    """

    value: float
    text: str
    shade: int | None
    name: str


@dataclass(frozen=True)
class Grid:
    """The table.

    Args:
        columns: the places in a layer, in the order in which they are pruned.
        rows: the name of each layer, and its cell in each column, or None.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    least: str
    most: str

    @property
    def cells(self) -> list[Cell]:
        """Those that are there."""
        return [cell for _, row in self.rows for cell in row if cell is not None]


def grid(operators: Sequence[OperatorReport], value: Value, text: Callable[[float], str], log: bool) -> Grid:
    """Arrange operators.

    Args:
        value: of an operator; None leaves it out.
    """
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
    """Where an operator is.

    Returns:
        The number of its layer, and its name there, which all experts of the layer share.
    """
    match = PLACE.fullmatch(name)
    return (match[1], re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])) if match else ("", name)


def _shortened(kinds: Sequence[str]) -> list[str]:
    """The last part of each name, if that is enough to tell them apart."""
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
