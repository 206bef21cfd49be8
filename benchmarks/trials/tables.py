"""All rows, what they answered before anything was mended, and what they answer now."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import hostile
import mathematics
import reliability
import running
from calls import call
from rows import Answer, Row, read
from workshop import command

HERE = Path(__file__).parent
BEFORE = HERE / "before.json"  # written by `--json` at commit 68a8e2b
SAID = 160  # characters of a message that are kept
ERROR = re.compile(r"\b[\w.]*(Error|Exception|Exit)\b: |No such (option|command)|Invalid value")


class Result(NamedTuple):
    """The answer to a row, and whether it is right."""

    list: str
    name: str
    kind: str
    right: bool
    seconds: float
    said: str

    @classmethod
    def of(cls, row: Row, answer: Answer) -> "Result":
        return cls(row.list, row.name, answer.kind, row.right(answer), round(answer.seconds, 1), short(row, answer))

    @property
    def key(self) -> str:
        """The list and the name."""
        return f"{self.list}/{self.name}"

    def line(self, old: dict[str, "Result"]) -> str:
        """One line for a terminal: old and new kind."""
        was = old.get(self.key)
        verdict = "as it should be" if self.right else "NOT RIGHT"
        return f"{self.name:28s} {was.kind if was else '-':8s} {self.kind:8s} {self.seconds:6.1f} s  {verdict}  {self.said}"


def short(row: Row, answer: Answer) -> str:
    """Our first error, another's last, or of what is no error the words that the row looks for."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", answer.said)
    if answer.kind in ("wrong", "right"):
        return said[:SAID] if answer.kind == "wrong" else ""
    if answer.kind in ("done", "failed", "slow"):
        found = re.search(row.says, said) if row.says else None
        return f"... {said[max(0, found.start() - 40) :][:SAID]} ..." if found else ""
    errors = [match.start() for match in ERROR.finditer(said)]
    at = errors[-1 if answer.kind == "raw" else 0] if errors else max(0, len(said) - SAID)
    return said[at:][:SAID]


def all_rows() -> list[Row]:
    """The four lists: commands, calls, mathematics, reliability."""
    commands, calls = read(HERE / "commands.tsv", command), read(HERE / "calls.tsv", call)
    return [*commands, *calls, *mathematics.rows, *reliability.rows, *running.rows, *hostile.rows]


def before() -> dict[str, Result]:
    """What the rows answered at the commit at which they were first tried."""
    results = [Result(**o) for o in json.loads(BEFORE.read_text())]
    return {result.key: result for result in results}
