"""torch's formats for the weight of a linear layer and its product; `bench` leaves out what a machine cannot do."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

GROUP = 64  # inputs that share a scale, of 4 bits


class AbstractProduct(nn.Module, ABC):
    """The product y = x W' + b for x [... n] of `dtype`, with W [m n] kept in the class's format."""

    dtype: torch.dtype

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else bias.to(self.dtype)
        self.keep(weight)

    @staticmethod
    def why_not(weight: Tensor) -> str | None:
        """Return the reason why the format cannot hold a weight [m n] here; None if it can."""

    @abstractmethod
    def keep(self, weight: Tensor) -> None:
        """Convert W [m n] into the format; its tensors become buffers."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return x W' [tokens m] for x [tokens n]."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight: the reads for a single token."""
        return sum(part.nbytes for name, part in self.named_buffers() if name != "bias")


class Float32(AbstractProduct):
    dtype = torch.float32
    weight: Tensor

    def keep(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight.to(self.dtype))

    def product(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class BFloat16(Float32):
    dtype = torch.bfloat16


class Int8(AbstractProduct):
    """8 bits per weight and a scale per row, rounded to nearest; torch's weight-only product."""

    dtype = torch.bfloat16
    codes: Tensor
    scale: Tensor

    def keep(self, weight: Tensor) -> None:
        scale = weight.float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        codes = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.register_buffer("codes", codes.contiguous())  # the weight of a Conv1D comes transposed
        self.register_buffer("scale", scale.to(self.dtype))

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)


class Int4(AbstractProduct):
    """4 bits per weight and a scale per `GROUP` of inputs, rounded to nearest; torch's weight-only product."""

    dtype = torch.bfloat16

    @staticmethod
    def why_not(weight: Tensor) -> str | None:
        if weight.device.type != "cpu":
            return "torch packs 4 bits in another layout there"
        if weight.shape[1] % GROUP or weight.shape[0] % 16:
            return f"its inputs are no multiple of {GROUP}, or its outputs none of 16"
        return None

    def keep(self, weight: Tensor) -> None:
        parts = weight.float().unflatten(1, (-1, GROUP))
        scale = parts.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 7
        codes = (parts / scale[..., None]).round().clamp(-8, 7) + 8
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).to(torch.int32), 1)
        self.register_buffer("codes", packed)
        ends = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1)
        self.register_buffer("scale_and_zero", ends.contiguous().to(self.dtype))

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, GROUP, self.scale_and_zero)


class CSR(AbstractProduct):
    """The non-zeros by row with 32-bit column numbers, in float32: torch's sparse product."""

    dtype = torch.float32

    def keep(self, weight: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that torch's CSR is beta
            kept = weight.to(self.dtype).to_sparse_csr()
            rows, columns = kept.crow_indices().int(), kept.col_indices().int()
            self.weight = torch.sparse_csr_tensor(rows, columns, kept.values(), kept.shape, check_invariants=False)
        self.kept = sum(part.nbytes for part in (rows, columns, kept.values()))

    def product(self, x: Tensor) -> Tensor:
        return (self.weight @ x.T).T

    @property
    def nbytes(self) -> int:
        return self.kept


class SemiStructured(AbstractProduct):
    """Two non-zeros in every four inputs, in bfloat16: the sparse tensor cores of NVIDIA's GPUs."""

    dtype = torch.bfloat16

    @staticmethod
    def why_not(weight: Tensor) -> str | None:
        if weight.device.type != "cuda":
            return "it needs an NVIDIA GPU"
        if weight.shape[1] % 4 or bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) > 2).any()):
            return "the weight is not 2:4"
        return None

    def keep(self, weight: Tensor) -> None:
        self.weight = torch.sparse.to_sparse_semi_structured(weight.to(self.dtype))
        self.kept = weight.numel() * 9 // 8  # half of the values of two bytes, and a bit of place for each

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    @property
    def nbytes(self) -> int:
        return self.kept


FORMATS: Mapping[str, type[AbstractProduct]] = {
    "float32": Float32,
    "bfloat16": BFloat16,
    "int8": Int8,
    f"int4, groups of {GROUP}": Int4,
    "CSR, float32": CSR,
    "2:4, bfloat16": SemiStructured,
}
