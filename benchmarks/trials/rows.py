"""A row of a list: what is tried, and which answers are right."""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

KINDS = {
    "refused": "an error of ours: short, in time, nothing left behind",
    "late": "an error of ours, but files were left behind",
    "long": "an error of ours of more than 3,000 characters",
    "raw": "an error of Python, torch or another library",
    "slow": "stopped: no answer in time",
    "done": "exit status 0, or a value",
    "failed": "a check of ours did not pass (exit status 1)",
    "right": "what has to hold holds",
    "wrong": "what has to hold does not",
}


class Answer(NamedTuple):
    """What was answered: one of KINDS, after how many seconds, and what was said."""

    kind: str
    seconds: float
    said: str


@dataclass(frozen=True)
class Row:
    """`run` is called in a process of its own, in the workshop; `text` is what is run, `what` what a reader sees of it.

    Right is an answer of a kind in `accepts` that says `says` (a regular expression) within `within` seconds.
    """

    list: str
    name: str
    what: str
    text: str
    accepts: tuple[str, ...]
    says: str
    within: float
    run: Callable[[], object]
    slow: bool = False

    def right(self, answer: Answer) -> bool:
        """Whether this is an answer that the row should have."""
        return answer.kind in self.accepts and re.search(self.says, answer.said) is not None


WITHIN = 120.0  # seconds, if a row does not say; the machine may have other work


def read(path: Path, run: Callable[[str], object]) -> list[Row]:
    """The rows of a table: name, accepted kinds, seconds, regular expression, and what is to be run."""
    rows = []
    for line in path.read_text().splitlines():
        name, accepts, within, says, text = line.split("\t")
        accepted, seconds = tuple(accepts.split("|")), float(within or WITHIN)
        slow = seconds > 2 * WITHIN
        rows.append(Row(path.stem, name, text, text, accepted, says, seconds, lambda t=text: run(t), slow))
    return rows


class Checks(list[Row]):
    """Rows that are functions: each asserts what has to hold. `needs` is what they use of the workshop."""

    def __init__(self, name: str, needs: str = "") -> None:
        super().__init__()
        self.name, self.needs = name, needs

    def row(
        self, what: str, within: float = WITHIN, slow: bool = False, each: Iterable[str] = ()
    ) -> Callable[[Callable[..., object]], None]:
        """Add a function, with a sentence that says what has to hold; a row of it for `each` argument, if there are."""

        def add(function: Callable[..., object]) -> None:
            source = f"{self.needs} {inspect.getsource(function)}"
            for value in each or [""]:
                name = f"{function.__name__}_{value}" if each else function.__name__
                run, said = partial(function, value) if each else function, what.format(value)
                self.append(Row(self.name, name, said, f"{source} {said}", ("right",), "", within, run, slow))

        return add
