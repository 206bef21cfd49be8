"""The memory of a GPU: release, and the advice after a failed allocation."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from convexprune.errors import ConvexpruneError, PruningError

MOST_SAID = 200  # characters of what torch says


def use_gpu(device: str) -> None:
    """Make a GPU the current device of the process, so that allocations without a device do not go to the first GPU."""
    index = torch.device(device).index
    if device.startswith("cuda") and index is not None:
        torch.cuda.set_device(index)


def release_unused() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def within_memory(advice: Callable[[], str] = str) -> Iterator[None]:
    """Turn all failures by lack of memory into a single error with advice."""
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
    """Return True if an `error` of Python or torch means lack of memory or of threads."""
    if isinstance(error, ConvexpruneError):
        return False
    known = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
    ran_out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return ran_out or any(words in str(error) for words in known)
