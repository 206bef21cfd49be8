"""What a GPU would pay for, counted on the CPU: host reads, sorts of long lines, products, and passes over memory."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique", "repeat_interleave")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
SORTS = ("sort", "kthvalue", "topk", "argsort", "msort", "median")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Counted(TorchDispatchMode):
    """Counts, inside, by kind.

    `reads` are numbers that the host reads from a tensor, each of which waits for the device; `sorts` the operators
    that order lines of more than `long` entries; `products` those of matrices; `passes` how often `size` entries are
    read or written by all others.
    """

    def __init__(self, size: int = 1, long: int = 0) -> None:
        super().__init__()
        self.size, self.long = size, long
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if name in READS or (name in INDEXED and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])):
            self.counts["reads"] += 1
        elif name in SORTS and any(t.ndim and t.shape[-1] > self.long for t in tensors):
            self.counts["sorts"] += 1
        elif name in PRODUCTS:
            self.counts["products"] += 1
        elif not _is_view(func):
            self.counts["passes"] += sum(t.numel() for t in tensors) // self.size
        return result


def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def counted(work: Callable[[], object], size: int = 1, long: int = 0) -> Counter[str]:
    """What `work` costs."""
    with Counted(size, long) as seen:
        work()
    return seen.counts


def each(more: Callable[[], object], fewer: Callable[[], object], times: int, **how: int) -> dict[str, float]:
    """What one iteration costs, of which `more` has so many `times` more than `fewer`."""
    first, second = counted(more, **how), counted(fewer, **how)
    return {kind: (first[kind] - second[kind]) / times for kind in ("reads", "sorts", "products", "passes")}
