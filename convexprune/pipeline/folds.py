"""The moments of one input in three disjoint parts: two halves that fit, and a part that judges."""

import torch
from torch import Tensor

from convexprune.moments import Moments


class Folds:
    """Moments of `width` inputs: the calibration windows dealt to two halves, and held-out windows apart."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.halves = (Moments(width, device=device), Moments(width, device=device))
        self.held_out = Moments(width, device=device)

    def add(self, pruned: Tensor, dense: Tensor | None, held_out: bool) -> None:
        """Count x* [samples tokens n]; each sample goes whole to one half, the one that has seen less.

        `dense` are the same tokens' x, if they differ and are to be corrected for.
        """
        for i in range(len(pruned)):
            first, second = self.halves
            fold = self.held_out if held_out else first if first.tokens <= second.tokens else second
            fold.add(pruned[i], None if dense is None else dense[i])

    @property
    def total(self) -> Moments:
        """The moments of all calibration windows, without those held out."""
        return self.halves[0] + self.halves[1]

    def is_finite(self) -> bool:
        """Whether every input was."""
        return all(fold.is_finite() for fold in (*self.halves, self.held_out))
