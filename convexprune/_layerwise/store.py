"""Where a run keeps what is between its layers: in memory, or in a folder that survives whatever ends the process."""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from convexprune._storage.batches import Batches
from convexprune._storage.failures import writing
from convexprune._storage.files import publish, sha256
from convexprune._storage.locks import locked
from convexprune._storage.notes import read_notes, write_notes
from convexprune._storage.tensors import CODES, DTYPES, Entry, Spec, entries, write_tensors
from convexprune.errors import OutputError
from convexprune.report import OperatorReport

POLL = 0.05  # seconds between two looks at what the other workers have published


class AbstractStates(ABC):
    """Which layer is next on a walk, and the hidden states that enter each."""

    @abstractmethod
    def claim(self) -> AbstractContextManager[int | None]:
        """The number of a layer that is now this worker's, as long as the block lasts; None once all are finished."""

    @abstractmethod
    def is_finished(self, number: int) -> bool:
        """Whether the layer of that `number` is finished."""

    @abstractmethod
    def scratch(self, number: int) -> AbstractContextManager[Callable[[], Recorded]]:
        """Inside, make places to record tensors in, which are gone afterwards unless they were put away.

        Args:
            number: of the layer that is worked on.

        Returns:
            A context that gives a function which makes a place.
        """

    @abstractmethod
    def hidden(self, number: int, stream: Stream) -> Recorded | None:
        """The batches that enter a layer.

        Args:
            number: of the layer.
            stream: of which network.

        Returns:
            The hidden states [batch tokens hidden] of each batch; None if they are not there or are damaged.
        """

    @abstractmethod
    def put_hidden(self, number: int, stream: Stream, batches: Recorded) -> None:
        """Keep what enters a layer until that layer is finished.

        Args:
            number: of the layer.
            stream: of which network.
            batches: the hidden states [batch tokens hidden].
        """

    @abstractmethod
    def load(self, model: AbstractModel, number: int, stream: Stream) -> None:
        """Give a finished layer that is in memory the weights of one network: its dense or its pruned ones.

        Args:
            model: the model.
            number: of the layer.
            stream: which network.

        Raises:
            OutputError: it was pruned in the memory of this process, and is no longer dense.
        """


class AbstractStore(AbstractStates):
    """The states of a run, and the layers that are finished."""

    @abstractmethod
    def finish(self, number: int, state: Mapping[str, Tensor], reports: Sequence[OperatorReport]) -> None:
        """Keep a pruned layer for good.

        Args:
            number: of the layer.
            state: its tensors by name.
            reports: one for each operator.
        """


class MemoryStore(AbstractStore):
    """Of one worker that takes the layers in the order of `numbers`; what it prunes is in the model.

    What is between the layers is where `record` makes a place, until it is used; with `keep`, for a way back, too.
    """

    def __init__(self, numbers: Iterable[int], record: Callable[[], Recorded] = list, keep: bool = False) -> None:
        self._numbers, self._record, self._keep = tuple(numbers), record, keep
        self._pending = list(self._numbers)
        self._hidden: dict[tuple[int, Stream], Recorded] = {}
        self._made: list[Recorded] = []

    def backward(self) -> "MemoryStore":
        """The states that were kept, for the same layers from the last to the first."""
        back = MemoryStore(reversed(self._numbers), self._record)
        back._hidden, back._made = self._hidden, self._made
        return back

    @contextmanager
    def claim(self) -> Iterator[int | None]:
        number = self._pending[0] if self._pending else None
        yield number
        self._pending = self._pending[1:]
        if not self._keep:
            for used in [key for key in self._hidden if key[0] == number]:
                del self._hidden[used]
        self._tidy_up()

    def is_finished(self, number: int) -> bool:
        return number not in self._pending

    @contextmanager
    def scratch(self, number: int) -> Iterator[Callable[[], Recorded]]:
        def record() -> Recorded:
            self._made.append(place := self._record())
            return place

        yield record
        self._tidy_up()

    def _tidy_up(self) -> None:
        """Remove the files that were made here and are needed no longer."""
        needed = {id(batches) for batches in self._hidden.values()}
        for place in self._made:
            if isinstance(place, Batches) and id(place) not in needed:
                place.path.unlink(missing_ok=True)
        self._made[:] = [place for place in self._made if id(place) in needed]

    def hidden(self, number: int, stream: Stream) -> Recorded | None:
        return self._hidden.get((number, stream))

    def put_hidden(self, number: int, stream: Stream, batches: Recorded) -> None:
        self._hidden[number, stream] = batches

    def load(self, model: AbstractModel, number: int, stream: Stream) -> None:
        """See `AbstractStates.load`: what enters a layer is never damaged, so no finished one is passed again."""

    def take(self, number: int) -> Recorded:
        """What was handed on to layer `number`, which is the caller's now."""
        return self._hidden.pop((number, "dense"))

    def finish(self, number: int, state: Mapping[str, Tensor], reports: Sequence[OperatorReport]) -> None:
        pass


class FolderStore(AbstractStore):
    """The folder `work` of a run; any number of processes may share it.

    A layer is claimed by a lock that vanishes with its process, so a killed worker's layer is free at once. Every file
    appears whole, and its checksum stands in a JSON file beside it, which is written last: what it names is there.

    Args:
        folder: the folder.
        count: how many decoder layers there are.
        device: where hidden states are wanted.
    """

    def __init__(self, folder: Path, count: int, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self.count = count
        self.pruned_here: set[int] = set()
        self._device = device
        self._mine = ""  # in the names of what only this process reads
        self._finished: set[int] = set()
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
            yield lambda: Batches(place / f"{uuid4().hex}.bin", device=self._device)

    @contextmanager
    def scratch_folder(self, number: int) -> Iterator[Path]:
        """An empty folder for whoever has claimed a layer; gone afterwards.

        Args:
            number: of the layer.

        Yields:
            The folder.
        """
        place = self.folder / "scratch" / f"{number:05d}{self._mine}"
        shutil.rmtree(place, ignore_errors=True)  # of a worker that was killed
        with writing(place):
            place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def hidden(self, number: int, stream: Stream) -> Recorded | None:
        name = f"{number:05d}.{stream}{self._mine}"
        notes, path = read_notes(self._notes("hidden", name)), self.folder / "hidden" / f"{name}.bin"
        if notes is not None and sha256(path) == notes["sha256"]:
            return Batches(path, DTYPES[notes["dtype"]], notes["shapes"], self._device)
        self._forget_hidden(number, stream)
        return None

    def put_hidden(self, number: int, stream: Stream, batches: Recorded) -> None:
        assert isinstance(batches, Batches) and batches.dtype is not None
        name = f"{number:05d}.{stream}{self._mine}"
        path = self.folder / "hidden" / f"{name}.bin"
        notes = {"dtype": CODES[batches.dtype], "shapes": batches.shapes, "sha256": sha256(batches.path)}
        with writing(path):
            publish(batches.path, path)
        batches.path = path
        write_notes(self._notes("hidden", name), notes)

    def compute_once(self, name: str, make: Callable[[], Any]) -> Any:
        """A value that one process computes for all: the first to ask; the others wait for it.

        Args:
            name: of the value.
            make: computes it; JSON has to be able to hold it.

        Returns:
            The value.
        """
        path = self.folder / f"{name}.json"
        while (value := read_notes(path)) is None:
            with locked(self.folder / f"{name}.lock") as is_locked:
                if is_locked and read_notes(path) is None:
                    write_notes(path, make())
            time.sleep(POLL)
        return value

    def layer(self, number: int) -> Mapping[str, Tensor]:
        """The tensors of the finished layer of that `number`, by name."""
        return load_file(self._shard(number))

    def entries(self, number: int) -> dict[str, Entry]:
        """Where the tensors of the finished layer of that `number` lie."""
        return entries(self._shard(number))[0]

    def finish(self, number: int, state: Mapping[str, Tensor], reports: Sequence[OperatorReport]) -> None:
        path = self._shard(number)
        write_tensors(path, {name: Spec.of(t) for name, t in state.items()}, state.__getitem__, {"format": "pt"})
        write_notes(
            self._notes("layers", path.stem), {"sha256": sha256(path), "operators": [asdict(r) for r in reports]}
        )
        self._let_go(number)

    def reports(self, number: int) -> list[OperatorReport]:
        """The reports of the finished layer of that `number`."""
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
        """Put into a `model` in memory what others, or an earlier process, have pruned."""
        for number in set(range(self.count)) - self.pruned_here:
            model.load_state(model.layers[number], self.layer(number))

    def require_whole(self) -> None:
        """See that every layer is on the disk as it was written.

        Raises:
            OutputError: a layer is not.
        """
        self.discard_damaged()
        if lost := [n for n in range(self.count) if not self._notes("layers", f"{n:05d}").exists()]:
            raise OutputError(
                f"{self.folder}: the disk does not hold what was written to it (layers {lost}). Mend it, then go on "
                "with resume=True (--resume)."
            )

    def discard_damaged(self) -> list[int]:
        """Forget every finished layer whose file or report is not what was written, and name them."""
        damaged = []
        for notes_path in sorted((self.folder / "layers").glob("*.json")):
            notes = read_notes(notes_path)
            if notes is None or sha256(notes_path.with_suffix(".safetensors")) != notes["sha256"]:
                notes_path.unlink(missing_ok=True)
                self._finished.discard(int(notes_path.stem))
                damaged.append(int(notes_path.stem))
        return damaged

    def _let_go(self, number: int) -> None:
        """Of what entered a layer, now that this one is finished."""
        self.pruned_here.add(number)
        for one in (number, number + 1):
            if self._is_used_up(one):
                self._forget_hidden(one, "dense")
                self._forget_hidden(one, "pruned")

    def _shard(self, number: int) -> Path:
        return self.folder / "layers" / f"{number:05d}.safetensors"

    def _notes(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.json"

    def _is_used_up(self, number: int) -> bool:
        """What enters a layer is what leaves the one before it, which aims at it until it is finished, too."""
        return self.is_finished(number) and (number == 0 or self.is_finished(number - 1))

    def _forget_hidden(self, number: int, stream: Stream) -> None:
        path = self._notes("hidden", f"{number:05d}.{stream}{self._mine}")
        path.unlink(missing_ok=True)
        path.with_suffix(".bin").unlink(missing_ok=True)


class RankStore(FolderStore):
    """The same folder for ranks that prune each layer together: each keeps what enters it of its own batches.

    Their first rank says which layer is next, and writes the layers.

    Args:
        folder: the folder.
        count: how many decoder layers there are.
        device: where hidden states are wanted.
        ranks: that prune together.
    """

    def __init__(self, folder: Path, count: int, device: torch.device | str, ranks: ProcessGroup) -> None:
        super().__init__(folder, count, device)
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
