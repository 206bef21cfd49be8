"""What a GPU would pay for, counted on the CPU: host reads, sorts of long lines, products, and passes over memory."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from convexprune._device import kernels

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique", "repeat_interleave")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
SORTS = ("sort", "kthvalue", "topk", "argsort", "msort", "median")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Counted(TorchDispatchMode):
    """Counts, inside, by kind.

    `reads` are numbers that the host reads from a tensor, each of which waits for the device; `sorts` the operators
    that order lines of more than `long` entries; `products` those of matrices; `passes` how often `size` entries are
    read or written by all others; `dispatched` whatever the host begins. If `compiled`, a function that is one kernel
    on a GPU reads and writes what it is given and what it returns, and nothing else.
    """

    def __init__(self, size: int = 1, long: int = 0, compiled: bool = False) -> None:
        super().__init__()
        self.size, self.long, self.compiled = size, long, compiled
        self.counts = Counter[str]()

    def __enter__(self) -> "Counted":
        self._patches = ExitStack()
        if self.compiled:
            self._patches.enter_context(patch.object(kernels, "has_kernels", lambda device: True))
            self._patches.enter_context(patch.object(kernels, "_compiled", self._kernel))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def _kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            given = [arg for arg in args if isinstance(arg, Tensor)]
            before = [tensor._version for tensor in given]
            with _disable_current_modes():
                result = function(*args)
            written = [tensor for tensor, version in zip(given, before, strict=True) if tensor._version > version]
            made = [leaf for leaf in tree_leaves(result) if all(leaf is not tensor for tensor in given)]
            self.counts["kernels"] += 1
            self.counts["dispatched"] += 1
            self.counts["passes"] += sum(tensor.numel() // self.size for tensor in (*given, *written, *made))
            return result

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        self.counts["dispatched"] += not _is_view(func)
        named = {key: value for key, value in (kwargs or {}).items() if key != "out"}  # written once, as the result
        read = () if name.startswith("new_") or name.endswith("_like") else (args, named)
        tensors = [leaf for leaf in tree_leaves((read, result)) if isinstance(leaf, Tensor)]
        if name in READS or (name in INDEXED and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])):
            self.counts["reads"] += 1
        elif name in SORTS and any(t.ndim and t.shape[-1] > self.long for t in tensors):
            self.counts["sorts"] += 1
        elif name in PRODUCTS:
            self.counts["products"] += 1
        elif not _is_view(func) and "empty" not in name:
            self.counts["passes"] += sum(t.numel() for t in tensors) // self.size
        return result


def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def counted(work: Callable[[], object], size: int = 1, long: int = 0, compiled: bool = False) -> Counter[str]:
    """What `work` costs."""
    with Counted(size, long, compiled) as seen:
        work()
    return seen.counts


def each(more: Callable[[], object], fewer: Callable[[], object], times: int, **how: Any) -> dict[str, float]:
    """What one iteration costs, of which `more` has so many `times` more than `fewer`."""
    first, second = counted(more, **how), counted(fewer, **how)
    return {kind: (first[kind] - second[kind]) / times for kind in ("reads", "sorts", "products", "passes", "kernels")}
