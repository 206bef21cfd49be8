"""Layouts of other engines, each a file here and a line in `LAYOUTS`, and the exact size of their files beforehand."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from convexprune.errors import DependencyError, PatternError, install_hint

LAYOUTS = {"compressed-tensors": "compressed_tensors", "gguf": "gguf_file"}
"""Modules of this package. `export` writes a model to another place, a folder with the card that it is given;
`measure` returns the `Size` of the files."""


def imported(format: str) -> Any:
    """Return the module of a format, which needs packages."""
    try:
        return import_module(f"{__package__}.{LAYOUTS[format]}")
    except ImportError as cause:
        raise DependencyError(f"format={format!r} needs: {install_hint(format)}") from cause


STACKED = re.compile(r"(.*\.experts)\.(\w+)\.(\d+)")
HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}  # of an operator that is two in a file


def stored_names(operator: str) -> list[str]:
    """Return the names of an operator in a checkpoint: those of an expert are apart there, and so are its halves."""
    match = STACKED.fullmatch(operator)
    if match is None:
        return [operator]
    return [f"{match[1]}.{match[3]}.{kind}" for kind in HALVES.get(match[2], (match[2],))]


@dataclass(frozen=True)
class Size:
    """Bytes of a file: fixed ones, and those of operators, embedding and head (`ends`) by their types."""

    fixed: int  # header, padding, tokenizer, and tensors that keep their type
    units: Mapping[tuple[str, ...], Mapping[str, int]]  # of operators that have a common type, by their names
    ends: tuple[str, ...]
    weights: int  # of all tensors
    metadata: Mapping[str, Any] = field(default_factory=dict)  # that have a part in the bytes of the header

    @property
    def least(self) -> int:
        """Bytes with the smallest types everywhere."""
        return self.fixed + sum(min(each.values()) for each in self.units.values())

    @property
    def most(self) -> int:
        """Bytes with the largest types everywhere."""
        return self.fixed + sum(max(each.values()) for each in self.units.values())

    def require(self, target: int) -> str:
        """Return what can be had, in words; refuse a target that no choice of types meets, or larger than all."""
        told = (
            f"A file of {target:,} bytes was asked for. Accepted: {self.least:,} (the smallest types everywhere) to "
            f"{self.most:,} bytes (the largest): {8 * self.least / self.weights:.2f} to "
            f"{8 * self.most / self.weights:.2f} bits for each of {self.weights:,} weights. {self.fixed:,} bytes are "
            "those of the header and of all that is not quantized."
        )
        if not self.least <= target <= self.most:
            raise PatternError(told)
        return told

    def total(self, types: Mapping[str, str]) -> int:
        """Return the bytes of the file for a choice of types by operator."""
        return self.fixed + sum(sizes[types[unit[0]]] for unit, sizes in self.units.items())

    def record(self, types: Mapping[str, str], target: int) -> dict[str, Any]:
        """Return what a report says of the file, for a choice of types by operator."""
        total = self.total(types)
        tensors = {", ".join(unit): [types[unit[0]], sizes[types[unit[0]]]] for unit, sizes in self.units.items()}
        bits = round(8 * total / self.weights, 4)
        return {"target": target, "bytes": total, "bits": bits, "tensors": tensors, "metadata": dict(self.metadata)}
