"""A pruned model as a smaller download, and back, bit for bit; a quantized one in the layout of other engines."""

from convexprune._container.compressed_tensors import export
from convexprune._container.folder import Packed, pack, unpack

__all__ = ["Packed", "export", "pack", "unpack"]
