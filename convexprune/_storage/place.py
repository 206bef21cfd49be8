"""Where a result may be written: found out before any work."""

import os
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from convexprune.errors import OutputError


def beside(folder: Path, what: str = "new") -> Path:
    """The folder beside another in which what is to take its place is made."""
    whole = folder.expanduser().absolute()
    return whole.with_name(f".{whole.name}.{what}")


def output_folder(given: str | Path, source: Any = None) -> Path:
    """The folder for a result, with "~" expanded."""
    try:
        folder = Path(given).expanduser()
        model = Path(source).expanduser() if isinstance(source, str | Path) else None
    except RuntimeError as cause:
        raise OutputError(f"{given}: {cause} Write the folder without '~'.") from cause
    if model is not None and model.is_dir() and folder.resolve().is_relative_to(model.resolve()):
        raise OutputError(f"{folder} lies inside of the model's own folder, {model}. Give another output folder.")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise OutputError(f"{folder} cannot be made: {there} is a file. Give another output folder.")
    try:
        os.rmdir(mkdtemp(dir=there, prefix=".", suffix=".part"))
    except OSError as cause:
        why = cause.strerror or cause
        raise OutputError(f"Nothing can be written to {there} ({why}). Give another output folder.") from cause
    return folder
