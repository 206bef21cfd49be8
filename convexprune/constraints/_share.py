"""A share of zeros: checked, and as a percentage that reads back to the very number."""

import re
from decimal import Decimal
from numbers import Real

from convexprune.errors import PatternError


def check_share(share: object) -> None:
    """Refuse numbers that are no share of zeros."""
    if not isinstance(share, Real):
        raise PatternError(f"Sparsity {share!r} is no number: it is the share of zeros, 0.5 for half.")
    if not 0 <= float(share) < 1:
        raise PatternError(f"Sparsity {share} is outside [0, 1): it is the share of zeros, 0.5 for half.")


def check_some(share: float, count: int, parts: str) -> None:
    """Refuse a share that rounds to none of the parts that can be removed, or to all."""
    if not 0 < (gone := round(share * count)) < count:
        one = float(f"{1 / count:.3g}")
        accepted = f"{one:g} for one of them, to {1 - one:.10g} for all but one" if count > 1 else "none"
        raise PatternError(f"Sparsity {share} of {count} {parts} rounds to {gone}. Accepted: {accepted}.")


def percent(share: float) -> str:
    """A `share` as a percentage that reads back: 0.5 as "50%"."""
    return f"{(Decimal(repr(float(share))) * 100).normalize():f}%"


def from_percent(text: str) -> float:
    """The share of a `text` of percent: "50" as 0.5."""
    return float(Decimal(text) / 100)


def share_of(kind: str, text: str, sparsity: float | None, quota: str, removed: str) -> float | None:
    """The share of zeros of a pattern that has a name and nothing else.

    Args:
        sparsity: the share that is given beside a name; None: a half.

    Returns:
        The share; None if the text is of another kind.
    """
    match = re.fullmatch(rf"{kind}(?: ([\d.]+)%)?", text)
    if match is None:
        return None
    if quota != "matrix":
        raise PatternError(f"Pattern {kind!r} removes {removed}. Leave quota out.")
    return from_percent(match[1]) if match[1] else 0.5 if sparsity is None else sparsity


def shares_around(share: float, reach: float, step: float) -> list[float]:
    """Return shares of zeros around a share, inside [0, 1)."""
    steps = round(reach / step)
    every = (round(share + each * step, 6) for each in range(-steps, steps + 1))
    return [each for each in every if 0 <= each < 1]
