"""Stores for hidden states between layers: the interface, and the store in memory (`folder_store` is on disk)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.model import AbstractModel
from convexprune._layerwise.settings import Stream
from convexprune._storage.batches import Batches
from convexprune.report import OperatorReport

BLOCKS = "blocks of "
"""Begins the names, among those of a layer's tensors, of what operators on block grids have in a file of such grids."""


class AbstractStore(ABC):
    """The queue of layers of a walk, the hidden states that enter layers, and the layers that are finished."""

    @abstractmethod
    def claim(self) -> AbstractContextManager[int | None]:
        """Claim a layer for the block; gives its number, or None once all layers are finished."""

    @abstractmethod
    def is_finished(self, number: int) -> bool:
        """Return True if the layer is finished."""

    @abstractmethod
    def scratch(self, number: int) -> AbstractContextManager[Callable[[], Recorded]]:
        """Make places for recorded tensors, which vanish at the end unless put away."""

    def compute_once(self, name: str, make: Callable[[], Any]) -> Any:
        """Compute a value by name; of processes that share the store in a single one."""
        return make()

    tensors_once = compute_once

    @abstractmethod
    def hidden(self, number: int, stream: Stream) -> Recorded | None:
        """Return the batches [batch tokens hidden] that enter a layer; None if missing or damaged."""

    @abstractmethod
    def put_hidden(self, number: int, stream: Stream, batches: Recorded) -> None:
        """Keep the inputs [batch tokens hidden] of a layer, by batch, until the layer is finished."""

    @abstractmethod
    def load(self, model: AbstractModel, number: int, stream: Stream) -> None:
        """Give a finished layer in memory the dense or the pruned weights."""

    @abstractmethod
    def finish(self, number: int, state: Mapping[str, Tensor], reports: Sequence[OperatorReport]) -> None:
        """Keep a pruned layer for good."""


class MemoryStore(AbstractStore):
    """The store of a worker that takes the layers in order; hidden states stay until used, or for a way back."""

    def __init__(self, numbers: Iterable[int], record: Callable[[], Recorded] = list, keep: bool = False) -> None:
        self._numbers, self._record, self._keep = tuple(numbers), record, keep
        self._pending = list(self._numbers)
        self._hidden: dict[tuple[int, Stream], Recorded] = {}
        self._made: list[Recorded] = []

    def backward(self) -> "MemoryStore":
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
        """Do nothing: inputs in memory are never damaged, so no finished layer is run again."""

    def take(self, number: int) -> Recorded:
        return self._hidden.pop((number, "dense"))

    def finish(self, number: int, state: Mapping[str, Tensor], reports: Sequence[OperatorReport]) -> None:
        pass
