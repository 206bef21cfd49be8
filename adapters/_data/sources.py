"""Data sets by name or path: checked before any work, and read."""

from pathlib import Path
from typing import Any

from convexprune.errors import CalibrationError, shown, unknown

from .conversations import Documents
from .corpora import CORPORA, Split, datasets_package, hub_documents
from .mixture import parts_of
from .rows import ACCEPTED
from .text_files import check_text, is_file, read_documents

LONGEST_NAME = 200  # characters of a data set's name or a path; a longer text is one


def check_dataset(dataset: Any) -> None:
    """Refuse, before any work, a data set whose name or path leads nowhere.

    Args:
        dataset: as the caller gave it.

    Raises:
        CalibrationError: there is no such file, or no such name.
        DependencyError: a data set of the hub needs a package that is missing.
    """
    if dataset is None or isinstance(dataset, int | float | bytes):
        raise CalibrationError(f"A data set of type {type(dataset).__name__} cannot calibrate. Accepted: {ACCEPTED}.")
    parts = parts_of(dataset)
    if len(parts) > 1:
        for name, _ in parts:
            check_dataset(name)
        return
    ((dataset, _),) = parts
    if not isinstance(dataset, str | Path) or dataset == "self":
        return
    name, *_ = addressed(dataset)
    if isinstance(name, Path) or (name not in CORPORA and is_file(name)):
        check_text(Path(name))
    elif len(name.split()) > 1 or len(name) > LONGEST_NAME:
        raise CalibrationError(
            f"dataset is a text of {len(name):,} characters, {shown(name[:40])}, and no name of a data set. Give "
            "texts as a list: dataset=[text]."
        )
    elif name.count("/") != 1 and name not in CORPORA:
        raise CalibrationError(f"{unknown('data set', name, ['self', *CORPORA])} Accepted: {ACCEPTED}.")
    elif name in CORPORA and dataset != name:
        raise CalibrationError(f"{dataset}: {name} has its own column and revision, so that runs can be repeated.")
    else:
        datasets_package()


def addressed(source: str | Path) -> tuple[str | Path, str | None, str | None]:
    """Split "FILE#FIELD" or "OWNER/NAME@REVISION#COLUMN" into the name, the column and the revision."""
    if isinstance(source, Path) or is_file(source):
        return source, None, None
    name, _, column = source.partition("#")
    if is_file(name):
        return name, column or None, None
    name, _, revision = name.partition("@")
    return name, column or None, revision or None


def documents_of(source: str | Path, split: Split, characters: int | None) -> Documents:
    """Read a file or a data set of the hub; of the latter about so many characters."""
    check_dataset(source)
    name, column, revision = addressed(source)
    if isinstance(name, Path) or (name not in CORPORA and is_file(name)):
        return read_documents(Path(name), column)
    return hub_documents(name, split, characters, column, revision)
