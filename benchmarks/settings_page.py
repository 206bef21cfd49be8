"""Every setting of `prune`, from the schema: a hook of mkdocs that writes docs/settings.md's tables.

mkdocs build; python benchmarks/settings_page.py
"""

import re
from collections.abc import Iterator
from typing import Any

from convexprune._cli.application import dashed
from convexprune._schema.functions import PRUNE

PLACE = "<!-- settings -->"
TITLES = {
    "model": "The model",
    "data": "Tokens for calibration and evaluation",
    "target": "Sparsity and pattern of operators",
    "method": "Pruning method, and targets of an operator",
    "run": "Measurements of a run",
    "device": "Device and number formats",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return markdown.replace(PLACE, "\n".join(tables())) if PLACE in markdown else markdown


def tables() -> Iterator[str]:
    names = list(PRUNE.fields)
    for group in sorted({PRUNE.group_of(name) for name in names}, key=list(TITLES).index):
        yield f"\n## {TITLES[group]} (`{group}`)\n\n| setting | default | meaning |\n|---|---|---|"
        yield from (row(name) for name in names if PRUNE.group_of(name) == group)


def row(name: str) -> str:
    info = PRUNE.fields[name]
    others = "".join(f"<br>`{option}`" for option in PRUNE.hint(name).options if dashed(name) != option[2:])
    default = info.default if isinstance(info.default, str | bool | int) else ", ".join(info.default or ())
    words = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", info.description or "")
    return f"| `{name}`{others} | {f'`{default}`' if default != '' else ''} | {words} |"


if __name__ == "__main__":
    print("\n".join(tables()))
