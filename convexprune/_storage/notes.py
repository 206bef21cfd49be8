"""Small files of text and JSON; notes are JSON with a checksum."""

import hashlib
import json
from pathlib import Path
from typing import Any

from convexprune._storage.failures import naming
from convexprune._storage.files import atomic_write, write
from convexprune.errors import OutputError


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; NaN and infinity are kept, as Python reads them back."""
    with atomic_write(path) as file:
        write(file, json.dumps(value, indent=1).encode())


def write_settings(path: Path, value: Any) -> None:
    """Write a file of settings as transformers does."""
    with atomic_write(path) as file:
        write(file, (json.dumps(value, indent=2) + "\n").encode())


def read_text(path: Path, longest: int) -> str:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OutputError(f"{path}: there is no such file. Is it the right folder?")
        if path.stat().st_size > longest:
            raise OutputError(f"{path} has {path.stat().st_size:,} bytes, and at most {longest:,} are read.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise OutputError(f"{path} is damaged: it is no text.") from cause
    except OutputError:
        raise
    except OSError as cause:
        raise OutputError(f"{path} cannot be read: {cause.strerror or cause}.") from cause


def read_json(path: Path) -> Any:
    """Return the value of the JSON file at `path`; None if it is missing or is not JSON."""
    try:
        with naming(path):
            return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def write_notes(path: Path, value: Any) -> None:
    """Write a value as `write_json` does, with its checksum."""
    write_json(path, {"checksum": _checksum(value), "notes": value})


def read_notes(path: Path) -> Any:
    """Return the value that `write_notes` wrote to `path`; None if it is missing or is not what was written."""
    match read_json(path):
        case {"checksum": checksum, "notes": value} if checksum == _checksum(value):
            return value
    return None


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
