"""Thresholds of long lines, and what is largest in each small group: without a sort, and without the host waiting."""

from itertools import combinations

import torch
from torch import Tensor

from convexprune._device.capabilities import is_host
from convexprune._device.kernels import fused

SHORT = 2**17  # entries that are sorted in one go; of more, counting is faster
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDEST = 16  # entries of a group that are compared pair by pair


def kth_smallest(lines: Tensor, k: int) -> Tensor:
    """The k-th smallest entry of each line.

    On a GPU `kthvalue` has one block of threads for each line, and no way that is deterministic by torch's own word. So
    few entries are sorted there, and in many the value is found bit by bit, by counting.

    Args:
        lines: [m n], not negative.
        k: from 1 to n.

    Returns:
        [m 1], the same on every device.
    """
    if is_host(lines.device):
        return lines.kthvalue(k, dim=1, keepdim=True).values
    if lines.numel() <= SHORT or lines.shape[1] <= WIDEST:
        return lines.sort(dim=1).values[:, k - 1 : k]
    return kth_by_counts(lines, k)


def kth_by_counts(lines: Tensor, k: int) -> Tensor:
    """The k-th smallest entry of each line, by one pass over the lines for each bit of a number.

    Numbers that are not negative are ordered as the integers that their bits are. The answer is the largest integer
    below which less than k of them lie.

    Args:
        lines: [m n], not negative.
        k: from 1 to n.

    Returns:
        [m 1].
    """
    bits = lines.view(INTEGERS[lines.dtype.itemsize])
    found = bits.new_zeros(len(bits), 1)
    for bit in range(8 * lines.dtype.itemsize - 2, -1, -1):  # the first one is the sign
        more = found + (1 << bit)
        found = torch.where(_below(bits, more) < k, more, found)
    return found.view(lines.dtype)


@fused
def _below(bits: Tensor, limit: Tensor) -> Tensor:
    """How many of each line are less than its limit [m 1]."""
    return (bits < limit).sum(1, keepdim=True)


def largest_of_groups(groups: Tensor, kept: int) -> Tensor:
    """Which are the largest of each group; of equal ones the earlier, and NaN is larger than all.

    Args:
        groups: [... M].
        kept: N, so many of each.

    Returns:
        [... M], True for the largest.
    """
    if groups.shape[-1] > WIDEST:
        order = groups.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    return _ranks(groups) < kept


@fused
def _ranks(groups: Tensor) -> Tensor:
    """How many of its group come before each entry, by comparing every pair."""
    entries = [entry.contiguous() for entry in groups.unbind(-1)]
    ranks = [torch.zeros_like(entry, dtype=torch.uint8) for entry in entries]
    for i, j in combinations(range(len(entries)), 2):
        first = (entries[i] >= entries[j]) | entries[i].isnan()
        ranks[i] += ~first
        ranks[j] += first
    return torch.stack(ranks, -1)


def middle_of_groups(groups: Tensor, kept: int) -> Tensor:
    """The mean of the N-th and the next largest size of each group.

    Args:
        groups: [... M].
        kept: N, from 1 to M - 1.

    Returns:
        [... 1].
    """
    if groups.shape[-1] > WIDEST:
        ordered = groups.abs().sort(dim=-1, descending=True).values
        return (ordered[..., kept - 1, None] + ordered[..., kept, None]) / 2
    return _middle(groups, kept)


@fused
def _middle(groups: Tensor, kept: int) -> Tensor:
    """By exchanging the larger of two for the smaller, until the first ones stand in their order."""
    entries = [entry.abs() for entry in groups.unbind(-1)]
    for i in range(kept + 1):
        for j in range(i + 1, len(entries)):
            pair = entries[i], entries[j]
            entries[i], entries[j] = torch.maximum(*pair), torch.minimum(*pair)
    return ((entries[kept - 1] + entries[kept]) / 2)[..., None]
