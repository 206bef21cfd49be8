"""Data sets by name or path: checked before any work, and read."""

from pathlib import Path
from typing import Any

from convexprune.errors import CalibrationError, shown, unknown

from .corpora import CORPORA, Split, datasets_package, hub_text
from .mixture import parts_of
from .rows import ACCEPTED
from .text_files import check_text, is_file, read_text

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
    if isinstance(dataset, str) and dataset in CORPORA:
        datasets_package()
    elif isinstance(dataset, Path) or is_file(dataset):
        check_text(Path(dataset))
    elif len(dataset.split()) > 1 or len(dataset) > LONGEST_NAME:
        raise CalibrationError(
            f"dataset is a text of {len(dataset):,} characters, {shown(dataset[:40])}, and no name of a data set. Give "
            "texts as a list: dataset=[text]."
        )
    elif dataset.count("/") == 1:
        datasets_package()
    else:
        raise CalibrationError(f"{unknown('data set', dataset, ['self', *CORPORA])} Accepted: {ACCEPTED}.")


def text_of(source: str | Path, split: Split, characters: int | None) -> str:
    """Read a file or a data set of the hub; of the latter about so many characters."""
    check_dataset(source)
    if isinstance(source, Path) or (source not in CORPORA and is_file(source)):
        return read_text(Path(source))
    return hub_text(source, split, characters)
