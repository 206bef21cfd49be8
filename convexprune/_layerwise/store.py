"""Where a walk keeps what is between its layers: what a store is, and the one in memory (`folder_store` is on disk)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.model import AbstractModel
from convexprune._layerwise.settings import Stream
from convexprune._storage.batches import Batches
from convexprune.report import OperatorReport


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
        """Inside, make places to record tensors in, which are gone afterwards unless they were put away."""

    @abstractmethod
    def hidden(self, number: int, stream: Stream) -> Recorded | None:
        """The batches that enter a layer.

        Returns:
            The hidden states [batch tokens hidden] of each batch; None if they are not there or are damaged.
        """

    @abstractmethod
    def put_hidden(self, number: int, stream: Stream, batches: Recorded) -> None:
        """Keep what enters a layer until that layer is finished.

        Args:
            batches: the hidden states [batch tokens hidden].
        """

    @abstractmethod
    def load(self, model: AbstractModel, number: int, stream: Stream) -> None:
        """Give a finished layer that is in memory the weights of one network: its dense or its pruned ones."""


class AbstractStore(AbstractStates):
    """The states of a run, and the layers that are finished."""

    @abstractmethod
    def finish(self, number: int, state: Mapping[str, Tensor], reports: Sequence[OperatorReport]) -> None:
        """Keep a pruned layer for good."""


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
