"""Templates of the package. Values are escaped for HTML or Markdown."""

import re
import shlex
from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

MARKDOWN = re.compile(r"([\\`*_\[\]<>#|&~$])")


def text_of(template: str, **values: Any) -> str:
    return visible(_environment().get_template(template).render(values))


def markdown(value: object) -> str:
    return MARKDOWN.sub(r"\\\1", _line(value))


def code(value: object) -> str:
    text = _line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def fenced(text: str, language: str) -> str:
    """Return a code block of Markdown. Backticks in the text cannot end the block."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}{language}\n{text}\n{fence}"


def visible(text: str) -> str:
    """Return a text with a sign in place of each control character; they could rewrite a terminal or hide text."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _line(value: object) -> str:
    return " ".join(str(value).split())


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("convexprune", "_rendering"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {"md": markdown, "code": code, "fenced": fenced, "shell": shlex.quote}
    made.filters.update(filters)
    return made
