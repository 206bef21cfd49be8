"""What is printed and written of the answers: totals, and the page of the rows that were once wrong."""

from collections import Counter
from collections.abc import Sequence

from rows import KINDS, Row
from tables import Result

HEAD = """# Trials: what was once answered wrongly, and what is answered now

convexprune was tried as a new user and as an attacker would: command lines, Python calls, problems that are no problems,
damaged files and checkpoints, killed processes. Each row is a script, and is tried again by

    python benchmarks/trials            (with --slow also the rows that kill processes or take minutes)

A row runs in a process of its own in a folder of tiny models. Its answer has a kind:

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
    """The page: kinds, totals, and each row that was wrong before or is wrong now, with both answers."""
    what = {f"{row.list}/{row.name}": row.what for row in rows}
    parts = [HEAD, "\n".join(f"- **{kind}**: {words}" for kind, words in KINDS.items())]
    parts += ["\n\n## Totals\n\n", totals(results, old)]
    for name, number in Counter(result.list for result in results).items():
        shown = [r for r in results if r.list == name and not (r.right and r.key in old and old[r.key].right)]
        parts.append(f"\n\n## {name.capitalize()}: {len(shown)} rows that were wrong, of {number}\n\n")
        parts.append("| what is tried | before | now |\n| --- | --- | --- |\n")
        parts.append("\n".join(_line(what[r.key], old.get(r.key), r) for r in shown))
    return "".join(parts) + "\n"


def _line(what: str, was: Result | None, now: Result) -> str:
    still = "" if now.right else "**not right** "
    return f"| {_code(what)} | {_answer(was)} | {still}{_answer(now)} |"


def _code(what: str) -> str:
    return f"`{_plain(what)}`" if " " in what and not what.endswith(".") else _plain(what)


def _answer(result: Result | None) -> str:
    return "" if result is None else f"{result.kind}: {_plain(result.said)}" if result.said else result.kind


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;").replace("\n", " ")
