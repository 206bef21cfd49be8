"""The README on a package index: its links lead to the repository. All else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE, FILE = (f"{PROJECT['urls']['Repository']}/{kind}/v{PROJECT['version']}/" for kind in ("blob", "raw"))


def absolute(text: str) -> str:
    """Make links absolute: of pictures to the file, of others to its page."""
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:|#)", rf"\1{FILE}", text)
    return re.sub(r"(?<!!)(\[[^\]!]*\]\()(?!\w+:|#)", rf"\1{PAGE}", text)


if __name__ == "__main__":
    setup(long_description=absolute((ROOT / "README.md").read_text()), long_description_content_type="text/markdown")
