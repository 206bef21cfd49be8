"""Whole numbers times a scale for each group of weights: which scales fit, and which ones a stored weight has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.constraints._abstract_grid import AbstractGrid, Made, rounded_scale
from convexprune.errors import PatternError

GROUPS = (32, 64, 128)
ROW = -1  # in place of a group: one scale for each output channel
CLIPS = 16  # candidates for each scale
AT_ONCE = 2**22  # products of a scale and a weight that are looked at together
PROBE = 8  # weights of a group that are looked at first: most scales do not fit them
NARROWEST, WIDEST = 0.45, 1.05  # of them: what the outermost code stands for, over the group's largest weight


@dataclass(frozen=True)
class Grid(AbstractGrid):
    """Weights that are a scale times a whole number of `bits` bits, with one scale for `group` columns or for a row.

    The numbers, or codes, are those from -2^(bits - 1) to 2^(bits - 1) - 1. A scale is a bfloat16 number, negative
    where the largest weight of its group is positive and takes the code -2^(bits - 1), which has no opposite. That is
    what the layout `pack-quantized` of compressed-tensors can say with symmetric groups.

    Args:
        bits: of a code, 3 to 8.
        group: columns that share a scale: 32, 64 or 128; -1 for all of a row, which is an output channel.

    Raises:
        PatternError: another number of bits or columns.
    """

    bits: int
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits not in range(3, 9) or self.group not in (*GROUPS, ROW):
            sizes = ", ".join(map(str, GROUPS))
            raise PatternError(
                f"int{self.bits} in groups of {self.group}: bits are 3 to 8, groups {sizes} columns, or -1 for a row."
            )

    @property
    def lowest(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The code of the largest size, -2^(bits - 1)."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The largest code, 2^(bits - 1) - 1."""
        return -self.lowest - 1

    def width(self, columns: int) -> int:
        """How many of the `columns` of a weight share a scale."""
        return columns if self.group == ROW else self.group

    def check(self, rows: int, columns: int) -> None:
        """See `AbstractGrid.check`: a row is a whole number of groups."""
        if columns % self.width(columns):
            fits = [str(size) for size in GROUPS if columns % size == 0]
            ways = f"Take group_size {' or '.join([*fits, '-1'])} (-1: one scale for a row)"
            raise PatternError(f"{columns} columns are no whole number of groups of {self.group}. {ways}.")

    def search(
        self,
        weight: Tensor,
        shape: Callable[[], Tensor],
        fit: Callable[["Grid"], Tensor],
        attempt: Callable[[slice, Tensor], Made],
    ) -> Made:
        """See `AbstractGrid.search`: the scales that `fit` gives."""
        return attempt(slice(None), fit(self))

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """See `AbstractGrid.project`: each group by its best scale."""
        scales, _, on = self.find(weight)
        scales = torch.where(on, scales.to(weight), self.fit(weight, metric))
        return self.weight(self.codes(weight, scales), scales)

    def violation(self, weight: Tensor) -> int:
        on = self.find(weight)[2]
        return weight.numel() // on.numel() * int((~on).sum())

    def fit(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """The scales of least squared error, of some candidates, when each entry is rounded to its nearest code.

        Args:
            weight: V [m n]; zeros need no code and do not count.
            metric: h [n], not negative: the error is sum_j h_j (code_j scale - V_j)^2; None: ones.

        Returns:
            [m n/group], not zero, rounded to bfloat16.
        """
        width = self.width(weight.shape[1])
        groups = weight.unflatten(1, (-1, width))
        weights = (groups != 0).to(weight)
        if metric is not None:
            weights *= metric.view(1, -1, width)
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        best = torch.ones_like(largest)
        least = torch.full_like(largest, torch.inf)
        for clip in torch.linspace(WIDEST, NARROWEST, CLIPS).tolist():
            scale = rounded_scale(largest * (clip / self.lowest))
            off = (groups / scale).round_().clamp_(self.lowest, self.highest).mul_(scale).sub_(groups)
            error = off.square_().mul_(weights).sum(2, keepdim=True)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return best.squeeze(2)

    def find(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scales and codes of a weight as it is stored, whatever its dtype: their products, rounded to it.

        Of several scales with which a group is on the grid it is the largest.

        Args:
            weight: [... n].

        Returns:
            Scales [... n/group] in float32, codes [... n] in int8, and which groups are on the grid [... n/group]; of
            others the scale and the codes mean nothing.
        """
        groups = weight.reshape(-1, self.width(weight.shape[-1]))
        largest = groups.float().abs().amax(1)
        candidates = self._candidates(largest)
        number, group = (_probed(groups, candidates) & (largest > 0)).nonzero().T
        few = max(1, AT_ONCE // groups.shape[1])
        pairs = zip(number.split(few), group.split(few), strict=True)
        fits = torch.cat([self._fits(groups[which], candidates[of, which]) for of, which in pairs])
        none = len(candidates)
        first = number.new_full((len(groups),), none).scatter_reduce_(0, group[fits], number[fits], "amin")
        on = (first < none)[:, None]
        scale = candidates.gather(0, first.clamp_max_(none - 1)[None]).T
        found = (groups.float() / scale).round_()
        flip = torch.where(found.amax(1, keepdim=True) > self.highest, -1.0, 1.0)
        scales = torch.where(on, scale * flip, 1.0)
        codes = torch.where(on, found * flip, 0.0).to(torch.int8)
        shape = *weight.shape[:-1], weight.shape[-1] // groups.shape[1]
        return scales.view(shape), codes.view_as(weight), (on[:, 0] | (largest == 0)).view(shape)

    def _candidates(self, largest: Tensor) -> Tensor:
        """Scales with which the largest weight of each group has a code, the smallest code first [number groups]."""
        codes = torch.arange(1, 1 - self.lowest, device=largest.device)[:, None]
        near = (largest / codes).bfloat16().view(torch.int16)
        all_near = torch.stack([near, near + 1, near - 1], dim=1).flatten(0, 1)
        return all_near.view(torch.bfloat16).float().clamp_min_(torch.finfo(torch.bfloat16).tiny)

    def _fits(self, weights: Tensor, scales: Tensor) -> Tensor:
        """Which groups [groups n] are codes, or all opposites of codes, times their scale [groups]."""
        codes = (weights.float() / scales[:, None]).round_()
        high, low = codes.amax(1), codes.amin(1)
        has = (high <= -self.lowest) & (low >= self.lowest) & ((high <= self.highest) | (low > self.lowest))
        return has & _on_grid(weights, scales).all(1)

    def __str__(self) -> str:
        return (
            f"int{self.bits} per output channel" if self.group == ROW else f"int{self.bits} in groups of {self.group}"
        )


def _on_grid(weights: Tensor, scales: Tensor) -> Tensor:
    """Which weights [groups n] are a whole number times the scale of their group [... groups], as they are stored."""
    scale = scales[..., None]
    return ((weights.float() / scale).round_().mul_(scale)).to(weights.dtype) == weights


def _probed(groups: Tensor, candidates: Tensor) -> Tensor:
    """With which candidates the first weights of a group are on the grid [number groups]."""
    few = max(1, AT_ONCE // (PROBE * len(candidates)))
    parts = zip(groups[:, :PROBE].split(few), candidates.split(few, dim=1), strict=True)
    return torch.cat([_on_grid(some, scales).all(2) for some, scales in parts], dim=1)
