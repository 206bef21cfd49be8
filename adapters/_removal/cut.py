"""A parameter without some channels: shape, values, and place of storage."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._storage.tensors import Entry, Spec, raw
from convexprune.errors import ModelError


@dataclass(frozen=True)
class Cut:
    """The removal along a dimension of a parameter, or of every expert inside."""

    dim: int  # of the parameter or of an expert's matrix
    # positions, by the number of the expert; None is the parameter itself
    removed: Mapping[int | None, tuple[int, ...]]
    reads: bool  # True if the channels are inputs: removed entries are zero

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the remaining shape of a parameter."""
        counts = {len(set(numbers)) for numbers in self.removed.values()}
        experts = None not in self.removed
        if len(counts) != 1 or (experts and self.removed.keys() != set(range(shape[0]))):
            raise ModelError(f"Of a parameter {list(shape)} not every expert loses as many channels.")
        dim, (count,) = self.dim + experts, counts
        return tuple(size - count if i == dim else size for i, size in enumerate(shape))

    def of(self, tensor: Tensor) -> Tensor:
        """Return the remaining part of a `tensor`."""
        if None in self.removed:
            return tensor.index_select(self.dim, self._kept(None, tensor).to(tensor.device))
        parts = (part.index_select(self.dim, self._kept(i, part).to(part.device)) for i, part in enumerate(tensor))
        return torch.stack(list(parts))

    def back(self, small: Tensor, dense: Tensor) -> Tensor:
        """Put a remaining part back to its places; a `dense` tensor has the removed entries, unless they are inputs."""
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
    """A tensor in a file whose removed channels are skipped."""

    whole: Entry | None = None
    cut: Cut | None = None

    @classmethod
    def without(cls, whole: Entry, cut: Cut) -> "CutEntry":
        shape = cut.shape(whole.spec.shape)
        before, after = torch.Size(whole.spec.shape).numel(), torch.Size(shape).numel()
        spec = Spec(whole.spec.code, shape, whole.spec.nbytes // before * after)
        return cls(whole.path, spec, whole.begin, whole, cut)

    def read(self) -> Tensor:
        assert self.whole is not None and self.cut is not None
        return self.cut.of(self.whole.read())

    def read_bytes(self) -> bytearray:
        return bytearray(raw(self.read()))
