"""Products of 16 bits on a CPU without instructions for 16 bits: in float32, rounded at the end."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convexprune._device.capabilities import MKLDNN_CHECKS, is_host, lacks_products

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}
"""Position of the left factor, whose rows are tokens, among the arguments of a product."""
_FEW = 32  # rows, below which a product takes less time than a copy of the weights in float32


def widened(device: torch.device, dtype: torch.dtype, rows: int = _FEW) -> AbstractContextManager[Any]:
    """Compute products of 16 bits in float32 and round the result, where a CPU is slow at 16 bits.

    Without such instructions torch adds up entry by entry, 5 to 100 times slower than in float32. Sums are in float32
    there as well: results differ by the order of the sums. `rows` is the largest number of rows of a product.
    """
    return _Widened() if rows >= _FEW and is_host(device) and lacks_products(dtype) else nullcontext()


class _Widened(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left = _PRODUCTS.get(func)
        if left is None or (dtype := args[left].dtype) not in MKLDNN_CHECKS or args[left].shape[-2] < _FEW:
            return func(*args, **kwargs or {})
        wide = (arg.float() if isinstance(arg, Tensor) else arg for arg in args)
        return func(*wide, **kwargs or {}).to(dtype)
