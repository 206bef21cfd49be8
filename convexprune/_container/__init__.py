"""Containers of a result: a smaller download without loss, and layouts of runtimes."""

from convexprune._container.folder import Packed, pack, unpack

__all__ = ["Packed", "pack", "unpack"]
