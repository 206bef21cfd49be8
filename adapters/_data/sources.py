"""Data sets by name or path, or several with shares: checked before any work, and read."""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune.errors import CalibrationError, shown, unknown

from .documents import (
    CORPORA,
    Documents,
    Split,
    datasets_package,
    exists,
    hub_documents,
    is_file,
    read_documents,
    split_field,
)
from .rows import ACCEPTED

LONGEST = 1000  # characters of names with shares; a longer text is one, and is refused with what to do

Part = tuple[Any, float]


def parts_of(dataset: Any) -> list[Part]:
    """Split "a.txt:0.5,self:0.5" into data sets and shares of the whole, equal by default; any other is one part."""
    if not isinstance(dataset, str) or not {",", ":"} & set(dataset) or len(dataset) > LONGEST or exists(dataset):
        return [(dataset, 1.0)]
    pairs = [_named(part.strip()) for part in dataset.split(",")]
    shares = [share for _, share in pairs if share is not None]
    if len(pairs) > 1 and len(shares) not in (0, len(pairs)):
        raise CalibrationError(f"{shown(dataset)}: give all parts a share, as in a.txt:0.5,self:0.5, or none of them.")
    if not all(0 < share < inf for share in shares) or len({name for name, _ in pairs if name}) < len(pairs):
        raise CalibrationError(f"{shown(dataset)}: shares are numbers above 0, and no part is empty or there twice.")
    total = sum(shares) or len(pairs)
    return [(name, (1.0 if share is None else share) / total) for name, share in pairs]


def needs_sampling(dataset: Any) -> bool:
    """Return True if the model writes the data set, or a part of it, itself."""
    return any(isinstance(name, str) and name == "self" for name, _ in parts_of(dataset))


def apportioned(count: int, parts: Sequence[Part]) -> list[int]:
    """Divide a number of samples by the shares of the parts: rounded down, the rest to the largest remainders."""
    exact = [share * count for _, share in parts]
    counts = [int(each + 1e-9) for each in exact]
    order = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for i in order[: count - sum(counts)]:
        counts[i] += 1
    return counts


def interleaved(windows: Sequence[Tensor]) -> Tensor:
    """Join windows [count length] of several parts so that every beginning has about the same shares of them."""
    places = torch.cat([(torch.arange(len(each)) + 0.5) / max(1, len(each)) for each in windows])
    return torch.cat(list(windows))[places.argsort(stable=True)]


def _named(part: str) -> tuple[str, float | None]:
    name, colon, share = part.rpartition(":")
    try:
        return (name, float(share)) if colon else (part, None)
    except ValueError:
        if is_file(name):
            raise CalibrationError(f"{shown(part)}: {shown(share)} is no share. Accepted: a number above 0.") from None
        return part, None


LONGEST_NAME = 200  # characters of a data set's name or a path; a longer text is one


def check_dataset(dataset: Any) -> None:
    """Refuse, before any work, a data set whose name or path leads nowhere."""
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
        read_documents(dataset)
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
    path, field = split_field(source)
    if isinstance(source, Path) or is_file(str(path)):
        return path if isinstance(source, Path) else str(path), field, None
    name, _, column = source.partition("#")
    name, _, revision = name.partition("@")
    return name, column or None, revision or None


def documents_of(source: str | Path, split: Split, characters: int | None) -> Documents:
    name, column, revision = addressed(source)
    if isinstance(name, Path) or (name not in CORPORA and is_file(name)):
        return read_documents(source)
    check_dataset(source)
    return hub_documents(name, split, characters, column, revision)
