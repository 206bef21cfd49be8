"""The working folder of a comparison: hidden states and records, so that a comparison can go on after a stop."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune._storage.batches import Batches
from convexprune._storage.failures import writing
from convexprune._storage.files import read_json, write_json
from convexprune.errors import OutputError


class Store:
    """Files, which appear whole, of hidden states, until all readers have a record, and of records, by network."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device

    def write_states(self, network: str, layer: int, stream: str, batches: Iterable[Tensor]) -> None:
        """Keep hidden states [batch tokens hidden] before a decoder layer, by batch."""
        path = self._states(network, layer, stream)
        temporary = path.with_suffix(".part")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
        recorded = Batches(temporary)
        for batch in batches:
            recorded.append(batch)
        recorded.keep(path)

    def states(self, network: str, layer: int, stream: str) -> Batches:
        """Return the hidden states of `write_states`, read from the file on use."""
        path = self._states(network, layer, stream)
        if (found := Batches.kept(path, self._device)) is None:
            raise OutputError(f"{path} is missing or damaged. Remove {self._folder}, and begin the comparison again.")
        return found

    def drop_states(self, network: str, layer: int) -> None:
        shutil.rmtree(self._states(network, layer, "").parent, ignore_errors=True)

    def record(self, network: str, layer: int, facts: Any) -> None:
        write_json(self._record(network, layer), facts)

    def recorded(self, network: str, layer: int) -> Any:
        return read_json(self._record(network, layer))

    def _states(self, network: str, layer: int, stream: str) -> Path:
        return self._folder / _safe(network) / f"states-{layer:03d}" / f"{stream}.bin"

    def _record(self, network: str, layer: int) -> Path:
        return self._folder / _safe(network) / f"layer-{layer:03d}.json"


def _safe(network: str) -> str:
    return "".join(c if c.isalnum() or c in ".=-" else "_" for c in network)
