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
PARTS = [6, 12, 24, 48, 96, 192]  # of the candidates: groups of few codes are done with the first ones
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
        scales, left = torch.zeros_like(largest), largest.nonzero().squeeze(1)
        for candidates in self._candidates(largest).tensor_split(PARTS):
            scales[left] = self._first(groups[left], candidates[:, left])
            left = left[scales[left] == 0]
            if not len(left):
                break
        on = scales > 0
        scales = torch.where(on, scales, 1.0)
        codes = torch.where(on[:, None], (groups.float() / scales[:, None]).round_(), 0.0)
        flip = torch.where(codes.amax(1) > self.highest, -1.0, 1.0)
        codes = (codes * flip[:, None]).to(torch.int8)
        shape = *weight.shape[:-1], weight.shape[-1] // groups.shape[1]
        return (scales * flip).view(shape), codes.view_as(weight), (on | (largest == 0)).view(shape)

    def _first(self, groups: Tensor, candidates: Tensor) -> Tensor:
        """The first of the scales [number groups] with which a group [groups n] is on the grid [groups]; 0 for none."""
        may, scales = _probed(groups, candidates), candidates.new_zeros(len(groups))
        while len(left := may.any(0).nonzero().squeeze(1)):
            number = may[:, left].int().argmax(0)
            scale = candidates[number, left]
            may[number, left] = False
            fits = self._has((groups[left].float() / scale[:, None]).round_()) & _on_grid(groups[left], scale).all(1)
            left = left[fits]
            scales[left] = scale[fits]
            may[:, left] = False
        return scales

    def _candidates(self, largest: Tensor) -> Tensor:
        """Scales with which the largest weight of each group has a code, the smallest code first [number groups]."""
        codes = torch.arange(1, 1 - self.lowest, device=largest.device)[:, None]
        near = (largest / codes).bfloat16().view(torch.int16)
        all_near = torch.stack([near, near + 1, near - 1], dim=1).flatten(0, 1)
        return all_near.view(torch.bfloat16).float().clamp_min_(torch.finfo(torch.bfloat16).tiny)

    def _has(self, codes: Tensor) -> Tensor:
        """Whether all codes of a group [groups group], or all of their opposites, are numbers of so many bits."""
        high, low = codes.amax(1), codes.amin(1)
        return (high <= -self.lowest) & (low >= self.lowest) & ((high <= self.highest) | (low > self.lowest))

    def __str__(self) -> str:
        return (
            f"int{self.bits} per output channel" if self.group == ROW else f"int{self.bits} in groups of {self.group}"
        )


def _on_grid(weights: Tensor, scales: Tensor) -> Tensor:
    """Which weights [groups n] are a whole number times the scale of their group [... groups], as they are stored."""
    scale = scales[..., None]
    return ((weights.float() / scale).round_().mul_(scale)).to(weights.dtype) == weights


def _probed(groups: Tensor, candidates: Tensor) -> Tensor:
    """With which candidates the first weights of a group are on the grid [number groups]: few of them, then more."""
    few = AT_ONCE // (PROBE * max(1, len(candidates)))
    parts = zip(groups[:, :PROBE].split(few), candidates.split(few, dim=1), strict=True)
    found = torch.cat([_on_grid(some, scales).all(2) for some, scales in parts], dim=1)
    more = groups[:, : PROBE**2]
    for number, group in zip(*(each.split(AT_ONCE // PROBE**2) for each in found.nonzero().T), strict=True):
        found[number, group] = _on_grid(more[group], candidates[number, group]).all(1)
    return found
