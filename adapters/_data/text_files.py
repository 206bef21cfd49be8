"""Text out of files."""

import json
from pathlib import Path

from convexprune.errors import CalibrationError, shown

TEXT_FILES = (".txt", ".jsonl")
UTF16 = "It is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8."
BEGINNINGS = {b"\x1f\x8b": "It is compressed. Unpack it: gunzip.", b"\xff\xfe": UTF16, b"\xfe\xff": UTF16}
OTHER = "If it is Latin-1: iconv -f LATIN1 -t UTF-8."


def is_file(text: str) -> bool:
    """Return True if `text` is a path: it ends like a text file's, or leads to something."""
    if text.endswith(TEXT_FILES):
        return True
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a text too long for a path, say
        return False


def check_text(path: Path) -> None:
    """Refuse, before any work, a file that `read_text` cannot read."""
    if path.suffix not in TEXT_FILES:
        there = f"{path} exists; " if is_file(str(path)) else f"{shown(str(path))}: "
        raise CalibrationError(f"{there}files of text end in {' or '.join(TEXT_FILES)}. Give such a file.")
    try:
        path.expanduser().open("rb").close()
    except (OSError, RuntimeError) as cause:
        raise CalibrationError(f"{path}: cannot be read ({getattr(cause, 'strerror', cause)}).") from cause


def read_text(path: Path) -> str:
    """Return the content of a .txt file, or the field "text" of every line of a .jsonl file."""
    check_text(path)
    try:
        content = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        mend = next(
            (how for begin, how in BEGINNINGS.items() if getattr(cause, "object", b"").startswith(begin)), OTHER
        )
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({cause}). {mend}") from cause
    if "\0" in content:
        raise CalibrationError(f"{path}: holds NUL bytes, so it is no UTF-8 text. Is it UTF-16, or no text at all?")
    if path.suffix == ".txt":
        return content
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    return "\n\n".join(_json_text(path, number, line) for number, line in lines)


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as cause:
        raise CalibrationError(f"{path}, line {number}: not JSON ({cause}). Mend or remove it.") from cause
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        if isinstance(row, dict):
            found = f"the fields {', '.join(map(shown, row))}"
            found += f", and {type(row['text']).__name__} in that one" if "text" in row else ""
        else:
            found = f"a {type(row).__name__}"
        raise CalibrationError(
            f'{path}, line {number}: needs an object with a field "text" that holds text; it has {found}. Write every '
            'line as {"text": "..."}.'
        )
    return row["text"]
