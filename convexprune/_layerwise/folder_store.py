"""The store of a run in a folder that survives whatever ends the process, shared by any number of processes."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import Tensor

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.model import AbstractModel
from convexprune._layerwise.processes import ProcessGroup
from convexprune._layerwise.settings import Stream
from convexprune._layerwise.store import BLOCKS, AbstractStore
from convexprune._storage.batches import Batches, Room
from convexprune._storage.failures import writing
from convexprune._storage.files import locked, read_notes, sha256, write_notes
from convexprune._storage.tensors import Entry, Spec, entries, write_tensors
from convexprune.errors import OutputError
from convexprune.report import OperatorReport

ENDS = "ends"  # embedding and head, if they are quantized
POLL = 0.05  # seconds between two looks at what the other workers have published


class FolderStore(AbstractStore):
    """The folder `work` of a run, shared by any number of processes.

    A lock that vanishes with its process claims a layer, so a killed worker's layer is free at once. Files appear
    whole. A JSON file beside a file has the checksum and is written last: a named file exists.
    """

    def __init__(self, folder: Path, count: int, device: torch.device | str = "cpu", room: Room | None = None) -> None:
        self.folder = folder
        self.count = count
        self.pruned_here: set[int] = set()
        self._device = device
        self._mine = ""  # in the names of what only this process reads
        self._finished: set[int] = set()
        self.room = room or Room()
        self._resident: dict[tuple[int, Stream], Batches] = {}  # what is in the folder as well, and is read from here
        with writing(folder):
            for name in ("hidden", "layers", "claims", "scratch"):
                (folder / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self) -> Iterator[int | None]:
        while pending := [n for n in range(self.count) if not self.is_finished(n)]:
            for n in pending:
                # The lowest can always be worked on: what enters it is there, or has to be computed again.
                if n != pending[0] and not self._notes("hidden", f"{n:05d}.dense").exists():
                    continue
                with locked(self.folder / "claims" / f"{n:05d}.lock") as is_locked:
                    if is_locked and not self.is_finished(n):
                        self._resident = {key: value for key, value in self._resident.items() if key[0] == n}
                        yield n
                        return
            time.sleep(POLL)
        yield None

    def is_finished(self, number: int) -> bool:
        if number not in self._finished and self._notes("layers", f"{number:05d}").exists():
            self._finished.add(number)
        return number in self._finished

    @contextmanager
    def scratch(self, number: int) -> Iterator[Callable[[], Recorded]]:
        with self.scratch_folder(number) as place:
            yield lambda: Batches(place / f"{uuid4().hex}.bin", device=self._device, room=self.room)

    @contextmanager
    def scratch_folder(self, number: int) -> Iterator[Path]:
        place = self.folder / "scratch" / f"{number:05d}{self._mine}"
        shutil.rmtree(place, ignore_errors=True)  # of a worker that was killed
        with writing(place):
            place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def hidden(self, number: int, stream: Stream) -> Recorded | None:
        if (number, stream) in self._resident:
            return self._resident[number, stream]
        found = Batches.kept(self._hidden(number, stream), self._device)
        if found is None:
            self._forget_hidden(number, stream)
        return found

    def put_hidden(self, number: int, stream: Stream, batches: Recorded) -> None:
        assert isinstance(batches, Batches)
        batches.keep(self._hidden(number, stream))
        if batches.held:
            self._resident[number, stream] = batches

    def compute_once(self, name: str, make: Callable[[], Any]) -> Any:
        """Compute a value in a single process: the first to ask computes, later processes wait."""
        path = self.folder / f"{name}.json"
        while (value := read_notes(path)) is None:
            with locked(self.folder / f"{name}.lock") as is_locked:
                if is_locked and read_notes(path) is None:
                    write_notes(path, make())
            if not is_locked:
                time.sleep(POLL)
        return value

    def tensors_once(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Compute tensors by name in a single process, as `compute_once`; a damaged file is made again."""
        path = self.folder / f"{name}.safetensors"

        def write() -> str:
            tensors = make()
            write_tensors(path, {key: Spec.of(each) for key, each in tensors.items()}, tensors.__getitem__, {})
            return str(sha256(path))

        while self.compute_once(name, write) != str(sha256(path)):
            self._notes("", name).unlink(missing_ok=True)
        return load_file(path)

    def layer(self, number: int) -> Mapping[str, Tensor]:
        return {name: entry.read() for name, entry in self.entries(number).items()}

    def entries(self, number: int) -> dict[str, Entry]:
        return {name: e for name, e in entries(self._shard(number))[0].items() if not name.startswith(BLOCKS)}

    def blocks(self, number: int) -> dict[str, Entry]:
        found = entries(self._shard(number))[0].items()
        return {name.removeprefix(BLOCKS): entry for name, entry in found if name.startswith(BLOCKS)}

    def kept(self, name: str) -> dict[str, Entry]:
        path = self.folder / f"{name}.safetensors"
        return entries(path)[0] if path.is_file() else {}

    def write_blocks(self, path: Path, layers: Sequence[str]) -> None:
        """Write the bytes of all that is on block grids to a file, if there is any, by names in the model."""
        every = enumerate(layers)
        found = {f"{layer}.{name}": entry for i, layer in every for name, entry in self.blocks(i).items()}
        ends = self.kept(ENDS).items()
        found |= {name.removeprefix(BLOCKS): entry for name, entry in ends if name.startswith(BLOCKS)}
        if found:
            specs = {name: entry.spec for name, entry in found.items()}
            write_tensors(path, specs, lambda name: found[name].read_bytes(), {})

    def finish(self, number: int, state: Mapping[str, Tensor], reports: Sequence[OperatorReport]) -> None:
        path = self._shard(number)
        write_tensors(path, {name: Spec.of(t) for name, t in state.items()}, state.__getitem__, {"format": "pt"})
        write_notes(
            self._notes("layers", path.stem), {"sha256": sha256(path), "operators": [asdict(r) for r in reports]}
        )
        self._let_go(number)

    def reports(self, number: int) -> list[OperatorReport]:
        return [OperatorReport.read(o) for o in read_notes(self._notes("layers", f"{number:05d}"))["operators"]]

    def load(self, model: AbstractModel, number: int, stream: Stream) -> None:
        if not model.streams and number in self.pruned_here:
            raise OutputError(
                f"{self.folder}: what enters a layer after {number} is damaged, and the model in memory is no longer "
                "dense. Load it again and go on with resume=True (--resume)."
            )
        if stream == "pruned":
            model.load_state(model.layers[number], self.layer(number))

    def restore(self, model: AbstractModel) -> None:
        for number in set(range(self.count)) - self.pruned_here:
            model.load_state(model.layers[number], self.layer(number))

    def require_whole(self) -> None:
        self.discard_damaged()
        if lost := [n for n in range(self.count) if not self._notes("layers", f"{n:05d}").exists()]:
            raise OutputError(
                f"{self.folder}: the disk does not hold what was written to it (layers {lost}). Mend it, then go on "
                "with resume=True (--resume)."
            )

    def discard_damaged(self) -> list[int]:
        """Forget finished layers whose file or report was changed, and return their names."""
        damaged = []
        for notes_path in sorted((self.folder / "layers").glob("*.json")):
            notes = read_notes(notes_path)
            if notes is None or sha256(notes_path.with_suffix(".safetensors")) != notes["sha256"]:
                notes_path.unlink(missing_ok=True)
                self._finished.discard(int(notes_path.stem))
                damaged.append(int(notes_path.stem))
        return damaged

    def _let_go(self, number: int) -> None:
        """Delete the hidden states between two layers that are done, once layer `number` is finished."""
        self.pruned_here.add(number)
        for one in (number, number + 1):
            if self.is_finished(one) and (one == 0 or self.is_finished(one - 1)):
                self._forget_hidden(one, "dense")
                self._forget_hidden(one, "pruned")

    def _shard(self, number: int) -> Path:
        return self.folder / "layers" / f"{number:05d}.safetensors"

    def _notes(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.json"

    def _forget_hidden(self, number: int, stream: Stream) -> None:
        self._resident.pop((number, stream), None)
        path = self._hidden(number, stream)
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _hidden(self, number: int, stream: Stream) -> Path:
        return self.folder / "hidden" / f"{number:05d}.{stream}{self._mine}.bin"


class RankStore(FolderStore):
    """A shared folder for ranks that prune a layer together: the first chooses and writes, all keep their states."""

    def __init__(
        self, folder: Path, count: int, device: torch.device | str, ranks: ProcessGroup, room: Room | None = None
    ) -> None:
        super().__init__(folder, count, device, room)
        self._ranks = ranks
        self._mine = f".{ranks.rank}"

    @contextmanager
    def claim(self) -> Iterator[int | None]:
        number = next((n for n in range(self.count) if not self.is_finished(n)), self.count)
        first = torch.tensor(0 if self._ranks.rank else number, device=self._device)
        number = int(self._ranks.all_reduce(first))  # a file may be seen later elsewhere
        self._finished.update(range(number))
        yield number if number < self.count else None

    def finish(self, number: int, state: Mapping[str, Tensor], reports: Sequence[OperatorReport]) -> None:
        if self._ranks.rank == 0:
            super().finish(number, state, reports)
        int(self._ranks.all_reduce(torch.zeros((), device=self._device)))  # now it is written
        self._finished.add(number)
        self._let_go(number)
