"""Texts to evaluate on: files, and texts of a different kind that every installation has."""

import ast
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from convexprune.adapters._data.documents import TEXT_FILES, read_text
from convexprune.errors import CalibrationError, unknown

STATEMENTS = ast.stmt | ast.excepthandler | ast.match_case  # what a definition stands in
LICENCE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


def text_of(source: str) -> str:
    if source in TEXTS:
        return TEXTS[source]()
    if source.endswith(TEXT_FILES):
        return read_text(Path(source))
    raise CalibrationError(f"{unknown('text', source, TEXTS)} Or give a path that ends in {' or '.join(TEXT_FILES)}.")


@cache
def python_docs() -> str:
    """Return the docstrings of Python's standard library by module; they change with the version of Python."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    return "\n\n".join(doc for path in files for doc in _docstrings(path))


@cache
def licences() -> str:
    """Return the licences of the installed packages, without repeated paragraphs; they change with the packages."""
    paragraphs: dict[str, None] = {}
    for distribution in sorted(distributions(), key=lambda d: d.metadata["Name"].lower()):
        for file in sorted(distribution.files or [], key=str):
            if file.name.upper().startswith(LICENCE_NAMES) and file.suffix not in (".py", ".pyc"):
                path = Path(str(file.locate()))
                text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
                paragraphs |= {" ".join(part.split()): None for part in text.split("\n\n")}
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


TEXTS: dict[str, Callable[[], str]] = {"python-docs": python_docs, "licences": licences}


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the library carries a few files that are wrong on purpose
        return
    waiting = deque[ast.AST]([tree])
    while waiting:  # breadth first, as `ast.walk`, but past all expressions
        node = waiting.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc is not None and len(doc) >= 200:
                yield doc
        if hasattr(node, "body") or isinstance(node, ast.Match):
            waiting.extend(n for n in ast.iter_child_nodes(node) if isinstance(n, STATEMENTS))
