"""The memory of a GPU: whose it is, what may stay there, what is given back, and what to say when it runs out."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol
from weakref import WeakSet

import torch

from convexprune._device.capabilities import is_host
from convexprune.errors import ConvexpruneError, PruningError

MOST_SAID = 200  # characters of what torch says
USABLE = 0.9  # of what is free: memory is given out in pieces that do not fit together


class Holder(Protocol):
    """What holds tensors on a GPU that could be elsewhere."""

    @property
    def held(self) -> int:
        """Bytes of them."""
        ...


class Room:
    """Bytes on a GPU that a run does not need, for tensors that would go to the disk, as long as somebody holds
    them.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit, self._holders = limit, WeakSet[Holder]()

    def has(self, nbytes: int, holder: Holder) -> bool:
        """Whether a holder may hold so many bytes more.

        Args:
            nbytes: how many.
        """
        if sum(each.held for each in self._holders | {holder}) + nbytes >= self._limit:
            return False
        self._holders.add(holder)
        return True


def room_on(device: torch.device | str, needed: int) -> Room:
    """What a run leaves free of a GPU by its formula.

    Args:
        needed: bytes of the device's memory that it needs.

    Returns:
        The room: none on a CPU, where files are in memory anyway as long as they fit.
    """
    device = torch.device(device)
    if is_host(device):
        return Room()
    release_unused()
    return Room(int(USABLE * torch.cuda.mem_get_info(device)[0]) - needed)


def use_gpu(device: str) -> None:
    """Make a GPU the current one of this process, so that what names none is not on the first."""
    index = torch.device(device).index
    if device.startswith("cuda") and index is not None:
        torch.cuda.set_device(index)


def release_unused() -> None:
    """Give back what torch keeps of GPUs for later, so that another process can have it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def within_memory(advice: Callable[[], str] = str) -> Iterator[None]:
    """Turn the ways in which memory runs out into one error that says what to lower.

    Args:
        advice: says what this run needs, and what would need less; what fails in there is not told.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as cause:
        if not lacks_memory(cause):
            raise
        said = (str(cause) or type(cause).__name__).partition("\n")[0][:MOST_SAID].rstrip(".")
        known = ""
        with suppress(Exception):
            known = advice()
        raise PruningError(
            f"Memory ran out: {said}. Free some, or have fewer workers, and go on with resume=True "
            "(--resume) if the run has a folder: what is finished is kept. Or begin again with a smaller batch_size "
            "(--batch-size) or max_seq_length (--seqlen); `convexprune inspect MODEL` says what a run needs."
            + (f" {known}" if known else "")
        ) from cause


def lacks_memory(error: Exception) -> bool:
    """Whether an `error` of Python or torch says that memory ran out, or threads."""
    if isinstance(error, ConvexpruneError):
        return False
    known = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
    ran_out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return ran_out or any(words in str(error) for words in known)
