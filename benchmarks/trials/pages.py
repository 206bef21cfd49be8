"""What is printed and written of the answers: totals, and the page of the rows that were once wrong."""

from collections import Counter
from collections.abc import Sequence

from rows import KINDS, Row
from tables import Result

HEAD = """# Trials: what was answered wrongly at first, and what is answered now

A user who makes a mistake, a broken file or a problem that has no solution should get one clear error, early; a killed
or damaged run should give the same bits or say why not. Everything on this page was once tried and answered wrongly.
Each row is a script and can be tried again:

    python benchmarks/trials                    all rows but the slow ones
    python benchmarks/trials --slow             also those that kill processes or take minutes
    python benchmarks/trials --only 'dev_'      rows by name

A row is right if its answer is of a kind that it accepts and says what it should, in time. Messages are cut here to 160
characters. Commands and calls work on tiny random models (`m/...`), texts (`t/...`) and finished runs
(`r/...`); `...` in a command stands for `--dataset t/ok.txt --nsamples 4 --seqlen 32`. There is no hub within reach.
The answers "before" are those of the same script at commit 68a8e2b, or of rows named `four_` at 4d9cd68.

"""


def totals(results: Sequence[Result], old: dict[str, Result]) -> str:
    """Rows, those that were right before, those that are right now, for each list and in all."""
    names = dict.fromkeys(result.list for result in results)
    lines = ["| list | rows | right before | right now |", "| --- | --- | --- | --- |"]
    for name in (*names, "all"):
        part = [result for result in results if name in (result.list, "all")]
        was = sum(old[r.key].right for r in part if r.key in old)
        lines.append(f"| {name} | {len(part)} | {was} | {sum(r.right for r in part)} |")
    return "\n".join(lines)


def markdown(results: Sequence[Result], old: dict[str, Result], rows: Sequence[Row]) -> str:
    """The page: totals, kinds, and each row that was wrong before or is wrong now, with both answers."""
    what = {f"{row.list}/{row.name}": row.what for row in rows}
    kinds = "\n".join(f"| {kind} | {words} |" for kind, words in KINDS.items())
    parts = [HEAD, totals(results, old), "\n\n| answer | what it means |\n| --- | --- |\n", kinds]
    for name, number in Counter(result.list for result in results).items():
        shown = [r for r in results if r.list == name and not (r.right and r.key in old and old[r.key].right)]
        parts.append(f"\n\n## {name.capitalize()}: {len(shown)} of {number} rows were wrong\n\n")
        parts.append("| what is tried | before | now |\n| --- | --- | --- |\n")
        parts.append("\n".join(_line(_what(r, what[r.key]), old.get(r.key), r) for r in shown))
    return "".join(parts) + "\n"


def _line(what: str, was: Result | None, now: Result) -> str:
    still = "" if now.right else "**not right** "
    return f"| {what} | {_answer(was)} | {still}{_answer(now)} |"


def _what(result: Result, text: str) -> str:
    return f"`{_cell(text)}`" if result.list in ("commands", "calls") else _plain(text)


def _answer(result: Result | None) -> str:
    return "" if result is None else f"{result.kind}: {_plain(result.said)}" if result.said else result.kind


def _plain(text: str) -> str:
    return _cell(text).replace("<", "&lt;").replace("[", "\\[")  # [a][b] would be a link


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
