"""Documents: texts and conversations out of files, as a tokenizer reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from convexprune.errors import CalibrationError, shown

FIELDS = ("role", "content")


class Documents(NamedTuple):
    """The rows of a data set, all texts or all conversations, and the text between texts."""

    rows: Sequence[Any]  # texts, or lists of messages {"role": ..., "content": ...}
    separator: str = "\n\n"

    def text(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, bool]:
        """Return all rows as one text, and whether the tokenizer is to begin it: a chat template begins its own."""
        if all(isinstance(row, str) for row in self.rows):
            return self.separator.join(self.rows), True
        if tokenizer is None or not tokenizer.chat_template:
            raise CalibrationError(
                "The data set holds conversations, and the tokenizer has no chat template. Take an instruct model, or "
                "write the conversations as text."
            )
        return "".join(_rendered(row, tokenizer) for row in self.rows), False


def is_conversation(row: Any) -> bool:
    return isinstance(row, Sequence) and not isinstance(row, str) and len(row) > 0 and all(map(_is_message, row))


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(field), str) for field in FIELDS)


def _rendered(conversation: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(conversation), tokenize=False))
    except Exception as cause:  # a template raises what it likes
        raise CalibrationError(
            f"The chat template refuses the conversation that begins {shown(str(conversation)[:60])} ({cause})."
        ) from cause


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
    """Refuse, before any work, a file that `read_documents` cannot read."""
    if path.suffix not in TEXT_FILES:
        there = f"{path} exists; " if is_file(str(path)) else f"{shown(str(path))}: "
        raise CalibrationError(f"{there}files of text end in {' or '.join(TEXT_FILES)}. Give such a file.")
    try:
        path.expanduser().open("rb").close()
    except (OSError, RuntimeError) as cause:
        raise CalibrationError(f"{path}: cannot be read ({getattr(cause, 'strerror', cause)}).") from cause


def read_documents(path: Path, field: str | None = None) -> Documents:
    """Return a .txt file as a text, or a .jsonl file's lines as texts ("text") or conversations ("messages")."""
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
        return Documents([content])
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    rows = [_row(path, number, line, field) for number, line in lines]
    if len({type(row) for row in rows}) > 1:
        raise CalibrationError(f"{path}: some lines hold text and some conversations. Give two files, a.jsonl,b.jsonl.")
    return Documents(rows)


def read_text(path: Path) -> str:
    """Return the text of a file that holds no conversations."""
    documents = read_documents(path)
    if not all(isinstance(row, str) for row in documents.rows):
        raise CalibrationError(f"{path} holds conversations, and text is needed here.")
    return documents.text(None)[0]


def _row(path: Path, number: int, line: str, field: str | None) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as cause:
        raise CalibrationError(f"{path}, line {number}: not JSON ({cause}). Mend or remove it.") from cause
    name = field or ("messages" if isinstance(row, dict) and "text" not in row and "messages" in row else "text")
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, str) or is_conversation(value):
        return value
    if isinstance(row, dict):
        found = f"the fields {', '.join(map(shown, row))}"
        found += f", and {type(row[name]).__name__} in that one" if name in row else ""
    else:
        found = f"a {type(row).__name__}"
    raise CalibrationError(
        f'{path}, line {number}: needs an object with a field "{name}" that holds text, or messages with role and '
        f'content; it has {found}. Write every line as {{"text": "..."}}, or name another field: {path.name}#FIELD.'
    )
