"""A hook of mkdocs: links from a page to lab/, which is not on the site, lead to the repository."""

import re
import tomllib
from pathlib import Path
from typing import Any

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page's text with links that the site can follow."""
    return re.sub(r"\]\(\.\./lab/", f"]({REPOSITORY}/blob/main/lab/", markdown)
