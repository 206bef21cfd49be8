"""Hooks of the site: the tables of docs/settings.md from the schema, links to lab/, and a reference without noise.

mkdocs build; python benchmarks/site.py
"""

import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

from convexprune._cli.application import dashed
from convexprune._schema.functions import PRUNE

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
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
    """Return a page's text with the tables of settings, and with links into the repository in place of lab/'s."""
    markdown = re.sub(r"\]\(\.\./lab/", f"]({REPOSITORY}/blob/main/lab/", markdown)
    return markdown.replace(PLACE, "\n".join(tables())) if PLACE in markdown else markdown


class QuietInspection(griffe.Extension):
    """Leave out of the reference the docstrings of Python's own types, and the factories of dataclasses."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        if inspect.getdoc(node.obj) == inspect.getdoc(type(node.obj)):
            attr.docstring = None

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        for parameter in func.parameters:
            if parameter.default == "<factory>":
                parameter.default = None


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
