"""A pruned model as a smaller download, and back, bit for bit."""

from convexprune.container.folder import Packed, pack, unpack

__all__ = ["Packed", "pack", "unpack"]
