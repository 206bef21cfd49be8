"""A data set made of several: texts by name or path, and the share of the samples that comes from each."""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune.errors import CalibrationError, shown

LONGEST = 1000  # characters of names with shares; a longer text is one, and is refused with what to do

Part = tuple[Any, float]


def parts_of(dataset: Any) -> list[Part]:
    """Split "a.txt:0.5,self:0.5" into data sets and shares that add up to 1; whatever is no such text is one part.

    Without shares, as in "a.txt,b.txt", all parts have the same.
    """
    if not isinstance(dataset, str) or not {",", ":"} & set(dataset) or len(dataset) > LONGEST or _exists(dataset):
        return [(dataset, 1.0)]
    pairs = [_named(part.strip()) for part in dataset.split(",")]
    shares = [share for _, share in pairs if share is not None]
    if len(pairs) > 1 and len(shares) not in (0, len(pairs)):
        raise CalibrationError(f"{shown(dataset)}: give all parts a share, as in a.txt:0.5,self:0.5, or none of them.")
    if not all(0 < share < inf for share in shares) or len({name for name, _ in pairs}) < len(pairs):
        raise CalibrationError(f"{shown(dataset)}: shares are numbers above 0, and no part stands there twice.")
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
        return part, None


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a text too long for a path, say
        return False
