"""Thresholds of long lines, the largest entries of small groups: without a sort, and without waiting of the host."""

from itertools import combinations

import torch
from torch import Tensor

from convexprune._device.capabilities import is_host
from convexprune._device.kernels import are_fused, fused

DIGIT = 4  # bits of a number that one pass finds
SHORT = 2**17  # entries that are sorted in one go; of more, counting is faster
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDEST = 16  # entries of a group that are compared pair by pair


def kth_smallest(lines: Tensor, k: int) -> Tensor:
    """Return the k-th smallest entry of every line.

    On a GPU `kthvalue` has a block of threads per line, and no deterministic way. So few entries are sorted, and among
    many the value is computed digit by digit, by counting. Entries are not negative, and k begins at 1.
    """
    if is_host(lines.device):
        return lines.kthvalue(k, dim=1, keepdim=True).values
    if lines.numel() <= SHORT or lines.shape[1] <= WIDEST:
        return lines.sort(dim=1).values[:, k - 1 : k]
    return kth_by_counts(lines, k)


def kth_by_counts(lines: Tensor, k: int, digit: int | None = None) -> Tensor:
    """Return the k-th smallest entry of every line, with a pass over the lines for a digit of the number.

    Numbers that are not negative have the order of their bits as integers. The answer is the largest integer with less
    than k entries below. A pass counts the entries below all values of a digit at once: of 4 bits if a pass is a single
    kernel, else of 1, because a value then takes a pass.
    """
    bits = lines.view(INTEGERS[lines.dtype.itemsize])
    digit = digit or (DIGIT if are_fused(lines.device) else 1)
    values = torch.arange(1, 2**digit, dtype=bits.dtype, device=bits.device)
    answers, place = bits.new_zeros(len(bits), 1), 8 * lines.dtype.itemsize - 1  # without the sign
    rank = bits.new_full((), k)
    while place:
        few = place % digit or digit
        place -= few
        answers = _with_digit(bits, answers, values[: 2**few - 1] << place, rank)
    return answers.view(lines.dtype)


@fused
def _with_digit(bits: Tensor, answers: Tensor, values: Tensor, rank: Tensor) -> Tensor:
    """Add to the `answers` [m 1] the largest of the `values` with less than `rank` entries below."""
    limits = answers + values
    below = torch.stack([(bits < limit[:, None]).sum(1, dtype=torch.int32) for limit in limits.unbind(1)], 1)
    return torch.where(below < rank, limits, answers).amax(1, keepdim=True)


def largest_of_groups(groups: Tensor, kept: int) -> Tensor:
    """Mark the largest entries of every group [... M]. Of equal entries the earlier wins, and NaN beats all."""
    if groups.shape[-1] > WIDEST:
        order = groups.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    return _ranks(groups) < kept


@fused
def _ranks(groups: Tensor) -> Tensor:
    """Count the entries of the group that come before an entry, by comparing every pair."""
    entries = [entry.contiguous() for entry in groups.unbind(-1)]
    ranks = [torch.zeros_like(entry, dtype=torch.uint8) for entry in entries]
    for i, j in combinations(range(len(entries)), 2):
        first = (entries[i] >= entries[j]) | entries[i].isnan()
        ranks[i] += ~first
        ranks[j] += first
    return torch.stack(ranks, -1)


def middle_of_groups(groups: Tensor, kept: int) -> Tensor:
    """Return the mean [... 1] of the `kept`-th and the next largest size of every group [... M]."""
    if groups.shape[-1] > WIDEST:
        ordered = groups.abs().sort(dim=-1, descending=True).values
        return (ordered[..., kept - 1, None] + ordered[..., kept, None]) / 2
    return _middle(groups, kept)


@fused
def _middle(groups: Tensor, kept: int) -> Tensor:
    """Exchange pairs, the larger to the front, until the first places are in order."""
    entries = [entry.abs() for entry in groups.unbind(-1)]
    for i in range(kept + 1):
        for j in range(i + 1, len(entries)):
            pair = entries[i], entries[j]
            entries[i], entries[j] = torch.maximum(*pair), torch.minimum(*pair)
    return ((entries[kept - 1] + entries[kept]) / 2)[..., None]
