"""A parameter without some channels: its shape, its values, and where it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._storage.tensors import Entry, Spec, raw
from convexprune.errors import ModelError


@dataclass(frozen=True)
class Cut:
    """What is removed of one dimension of a parameter, or of each expert in it.

    Args:
        dim: the dimension, of the parameter or of the matrix of an expert.
        removed: the numbers of what is removed, by the number of the expert; None is the parameter itself.
        reads: whether the channels are inputs: what is removed of it is zero.
    """

    dim: int
    removed: Mapping[int | None, tuple[int, ...]]
    reads: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is left of a parameter."""
        counts = {len(set(numbers)) for numbers in self.removed.values()}
        experts = None not in self.removed
        if len(counts) != 1 or (experts and self.removed.keys() != set(range(shape[0]))):
            raise ModelError(f"Of a parameter {list(shape)} not every expert loses as many channels.")
        dim, (count,) = self.dim + experts, counts
        return tuple(size - count if i == dim else size for i, size in enumerate(shape))

    def of(self, tensor: Tensor) -> Tensor:
        """What is left of a `tensor`."""
        if None in self.removed:
            return tensor.index_select(self.dim, self._kept(None, tensor).to(tensor.device))
        parts = (part.index_select(self.dim, self._kept(i, part).to(part.device)) for i, part in enumerate(tensor))
        return torch.stack(list(parts))

    def back(self, small: Tensor, dense: Tensor) -> Tensor:
        """What is left, put back to its places.

        Args:
            dense: of the whole shape; gives what was removed, unless that is read.
        """
        whole = torch.zeros_like(dense) if self.reads else dense.clone()
        for index in self.removed:
            part, values = (whole, small) if index is None else (whole[index], small[index])
            part.index_copy_(self.dim, self._kept(index, part).to(part.device), values.to(part))
        return whole

    def _kept(self, index: int | None, matrix: Tensor) -> Tensor:
        kept = torch.ones(matrix.shape[self.dim], dtype=torch.bool)
        kept[list(self.removed[index])] = False
        return kept.nonzero().flatten()


@dataclass(frozen=True)
class CutEntry(Entry):
    """A tensor in a file, of which some channels are not read."""

    whole: Entry | None = None
    cut: Cut | None = None

    @classmethod
    def without(cls, whole: Entry, cut: Cut) -> "CutEntry":
        """What is left of an entry."""
        shape = cut.shape(whole.spec.shape)
        before, after = torch.Size(whole.spec.shape).numel(), torch.Size(shape).numel()
        spec = Spec(whole.spec.code, shape, whole.spec.nbytes // before * after)
        return cls(whole.path, spec, whole.begin, whole, cut)

    def read(self) -> Tensor:
        assert self.whole is not None and self.cut is not None
        return self.cut.of(self.whole.read())

    def read_bytes(self) -> bytearray:
        return bytearray(raw(self.read()))
