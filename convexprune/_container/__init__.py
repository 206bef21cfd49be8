"""A pruned model as a smaller download, and back, bit for bit."""

from convexprune._container.folder import Packed, pack, unpack

__all__ = ["Packed", "pack", "unpack"]
