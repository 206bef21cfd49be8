"""Hidden states and records on disk: what lets a comparison hold one problem in memory, and go on where it stopped."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor


class Batches(Sequence[Tensor]):
    """Windows [windows tokens hidden] of one or more files, as batches that come to `device` one at a time."""

    def __init__(self, parts: Iterable[Tensor], batch_size: int, device: torch.device) -> None:
        self._batches = [batch for part in parts for batch in part.split(batch_size)]
        self._device = device

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [batch.to(self._device) for batch in self._batches[index]]
        return self._batches[index].to(self._device)


class Store:
    """The working folder of a comparison: for each network (the dense one, each variant) hidden states and records.

    Files are written beside their place and renamed, so that what is there is whole. Hidden states before decoder layer
    k are kept until everything that reads them is recorded.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write_states(self, network: str, layer: int, stream: str, batches: Iterable[Tensor], windows: int) -> None:
        """Keep the `windows` hidden states of a stream of windows before decoder layer `layer`, batch by batch."""
        path = self._states(network, layer, stream)
        temporary = _beside(path)
        whole, done = None, 0
        for batch in batches:
            if whole is None:
                whole = _mapped(temporary, (windows, *batch.shape[1:]), batch.dtype, shared=True)
            whole[done : done + len(batch)] = batch
            done += len(batch)
        assert whole is not None and done == windows
        shape = {"shape": list(whole.shape), "dtype": str(whole.dtype).removeprefix("torch.")}
        write_json(path.with_suffix(".json"), shape)
        os.replace(temporary, path)

    def states(self, network: str, layer: int, stream: str) -> Tensor:
        """The hidden states [windows tokens hidden] of `write_states`, read from the file as they are used."""
        path = self._states(network, layer, stream)
        shape = json.loads(path.with_suffix(".json").read_text())
        return _mapped(path, tuple(shape["shape"]), getattr(torch, shape["dtype"]), shared=False)

    def drop_states(self, network: str, layer: int) -> None:
        """Forget the states before decoder layer `layer`."""
        shutil.rmtree(self._states(network, layer, "").parent, ignore_errors=True)

    def record(self, network: str, layer: int, facts: Any) -> None:
        """Write down that decoder layer `layer` is done for a network, with what came of it."""
        write_json(self._record(network, layer), facts)

    def recorded(self, network: str, layer: int) -> Any:
        """What `record` wrote, or None."""
        path = self._record(network, layer)
        return json.loads(path.read_text()) if path.is_file() else None

    def _states(self, network: str, layer: int, stream: str) -> Path:
        return self._folder / _safe(network) / f"states-{layer:03d}" / f"{stream}.bin"

    def _record(self, network: str, layer: int) -> Path:
        return self._folder / _safe(network) / f"layer-{layer:03d}.json"


def _safe(network: str) -> str:
    """A folder's name for a network's."""
    return "".join(c if c.isalnum() or c in ".=-" else "_" for c in network)


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    return temporary


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = _beside(path)
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, shared: bool) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=shared, size=size, dtype=dtype).view(shape)
