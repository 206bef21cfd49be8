"""The working folder of a comparison: what lets it hold one problem in memory, and go on where it stopped."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexprune._storage.batches import Batches
from convexprune._storage.failures import writing
from convexprune._storage.notes import read_json, write_json
from convexprune.errors import OutputError


class Store:
    """For each network (the dense one, each variant) hidden states and records.

    Files appear whole. Hidden states before decoder layer k are kept until everything that reads them is recorded.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device

    def write_states(self, network: str, layer: int, stream: str, batches: Iterable[Tensor]) -> None:
        """Keep hidden states before a decoder layer.

        Args:
            batches: the hidden states [batch tokens hidden].
        """
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
        """The hidden states of `write_states`, read from the file as they are used."""
        path = self._states(network, layer, stream)
        if (found := Batches.kept(path, self._device)) is None:
            raise OutputError(f"{path} is missing or damaged. Remove {self._folder}, and begin the comparison again.")
        return found

    def drop_states(self, network: str, layer: int) -> None:
        """Forget the states before a decoder layer."""
        shutil.rmtree(self._states(network, layer, "").parent, ignore_errors=True)

    def record(self, network: str, layer: int, facts: Any) -> None:
        """Write down that a decoder layer is done for a network."""
        write_json(self._record(network, layer), facts)

    def recorded(self, network: str, layer: int) -> Any:
        """What `record` wrote.

        Returns:
            The facts; None if there are none.
        """
        return read_json(self._record(network, layer))

    def _states(self, network: str, layer: int, stream: str) -> Path:
        return self._folder / _safe(network) / f"states-{layer:03d}" / f"{stream}.bin"

    def _record(self, network: str, layer: int) -> Path:
        return self._folder / _safe(network) / f"layer-{layer:03d}.json"


def _safe(network: str) -> str:
    """A folder's name for a network's."""
    return "".join(c if c.isalnum() or c in ".=-" else "_" for c in network)
