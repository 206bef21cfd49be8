"""Containers of a result: a smaller download without loss, and layouts of runtimes."""

from convexprune._container.folder import Packed, pack, unpack
from convexprune._container.layouts import LAYOUTS, export

__all__ = ["LAYOUTS", "Packed", "export", "pack", "unpack"]
