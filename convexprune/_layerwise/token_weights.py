"""The setting `token_weights`: the weights of calibration tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.errors import RecipeError, unknown

SHARES = {"none": 0.0, "attention_sink": 0.1, "loss": 0.5}
"""The share of each kind if none is given; of sinks a tenth has most of the gain of a half (lab/tried.md)."""
SINK = 4
"""Tokens at the start of a window on which attention rests (arXiv 2309.17453)."""


@dataclass(frozen=True)
class TokenWeighting:
    """A kind of token weights, and the `share` of all weight that the kind distributes; the rest is uniform."""

    kind: str
    share: float

    @classmethod
    def parse(cls, text: str) -> "TokenWeighting":
        """Read "none", "attention_sink" or "attention_sink:0.25"."""
        kind, colon, share = text.partition(":")
        if kind not in SHARES:
            raise RecipeError(unknown("token weighting", kind, SHARES))
        if not colon:
            return cls(kind, SHARES[kind])
        try:
            found = cls(kind, float(share))
        except ValueError:
            found = cls(kind, -1.0)
        if kind == "none" or not 0 <= found.share < 1:
            raise RecipeError(
                f"token_weights={text!r}. Write none, or a kind with a share in [0, 1), attention_sink:0.25."
            )
        return found


def loss_weights(squares: Tensor, share: float) -> Tensor:
    """Return weights, 1 on average, of which a `share` follows the squared gradients [windows length] of the tokens."""
    mean = squares.mean(dtype=torch.float64).float()
    return 1 - share + share * squares / mean if mean > 0 else torch.ones_like(squares)


def sink_weights(windows: int, length: int, share: float) -> Tensor:
    """Return weights [windows length], 1 on average, that give the first `SINK` tokens a `share` of the sum."""
    weights = torch.ones(length)
    if length > SINK:
        weights[:SINK] = share * length / SINK
        weights[SINK:] = (1 - share) * length / (length - SINK)
    return weights.expand(windows, length)
