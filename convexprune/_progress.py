"""Progress of a run: phases and steps.

Progress reaches a follower as a message reaches a log: working code calls `begin`, and no callback is passed on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Step = Callable[[str], None]  # called as a step is done, with what it was
Begin = Callable[[str, int | None], Step]  # called as a phase begins, with its number of steps, if that is known

_follower: ContextVar[Begin | None] = ContextVar("follower", default=None)


@contextmanager
def followed_by(follower: Begin) -> Iterator[None]:
    """Call a follower at every phase of this thread."""
    token = _follower.set(follower)
    try:
        yield
    finally:
        _follower.reset(token)


def begin(phase: str, steps: int | None = None) -> Step:
    """Report that a phase begins."""
    follower = _follower.get()
    return follower(phase, steps) if follower is not None else _nobody


def _nobody(_: str = "") -> None:
    pass
