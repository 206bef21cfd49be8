"""Progress of long calls, as events that reach a follower as messages reach a log: working code calls `begin`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger("convexprune")
FORECAST = "forecast: "
"""How a phase begins that only says what comes."""


@dataclass(frozen=True)
class Event:
    """A phase that begins, or a step of a phase that is done.

    Args:
        phase: name of the phase: "loading the model", "pruning", ...
        done: number of finished steps; 0 as the phase begins.
        total: number of steps, or None if it is not known.
        step: the last step, in words.
        report: `OperatorReport` of the operator that the last step pruned, or None.
        earlier: number of steps that the run had finished before it was resumed. They come first, all at once.
    """

    phase: str
    done: int = 0
    total: int | None = None
    step: str = ""
    report: Any = None
    earlier: int = 0

    def __str__(self) -> str:
        count = f" {self.done}" if self.done else ""
        return f"{self.phase}{count}{f'/{self.total}' if count and self.total else ''} {self.step}".rstrip()


OnProgress = Callable[[Event], None]


class Step(Protocol):
    """A function to call as a step is done. A step that takes as long as several counts as so many."""

    def __call__(self, step: str = "", report: Any = None, steps: int = 1) -> None: ...


_follower: ContextVar[OnProgress | None] = ContextVar("follower", default=None)


@contextmanager
def followed_by(*followers: OnProgress | None) -> Iterator[None]:
    """Send the events of this thread to followers, and to the follower so far."""
    asked = [follower for follower in (_follower.get(), *followers) if follower is not None]

    def tell(event: Event) -> None:
        for follower in asked:
            follower(event)

    token = _follower.set(tell if asked else None)
    try:
        yield
    finally:
        _follower.reset(token)


def is_followed() -> bool:
    return _follower.get() is not None


def begin(phase: str, total: int | None = None, earlier: int = 0) -> Step:
    """Report that a phase begins. Without a follower, events go to the log `convexprune` at level INFO."""
    tell, done = _follower.get() or logger.info, 0

    def step(step: str = "", report: Any = None, steps: int = 1) -> None:
        nonlocal done
        done += steps
        tell(Event(phase, done, total, step, report, earlier))

    tell(Event(phase, 0, total, earlier=earlier))
    return step
