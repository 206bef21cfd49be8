"""Matrix products of 16 bits on a CPU that has no instructions for them: in float32, rounded at the end."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convexprune._device.capabilities import is_host

_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}
"""By the product: the place of its left factor, whose rows are tokens, among the arguments."""
_FEW = 32  # rows, below which a product takes less time than a copy of the weights in float32


def widened(device: torch.device, dtype: torch.dtype, rows: int = _FEW) -> AbstractContextManager[Any]:
    """Inside, products of 16 bits are computed in float32 and rounded, where a CPU is slow at them.

    Without such instructions torch adds up entry by entry, 5 to 100 times slower than in float32. Its sums are in
    float32 there as well: the results differ by the order of the sums.

    Args:
        device: of the products.
        dtype: of what they multiply.
        rows: the most that a product has, if it is known.

    Returns:
        A context; it does nothing on other devices and for other dtypes.
    """
    return _Widened() if rows >= _FEW and is_host(device) and lacks(dtype) else nullcontext()


@cache
def lacks(dtype: torch.dtype) -> bool:
    """Whether this CPU has no quick products of a dtype.

    Args:
        dtype: the dtype.

    Returns:
        Whether oneDNN, with which torch multiplies, says that it has none; what it does not say, it has.
    """
    check = getattr(torch.ops.mkldnn, _CHECKS.get(dtype, ""), None)
    return check is not None and not check()


class _Widened(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left = _PRODUCTS.get(func)
        if left is None or (dtype := args[left].dtype) not in _CHECKS or args[left].shape[-2] < _FEW:
            return func(*args, **kwargs or {})
        wide = (each.float() if isinstance(each, Tensor) else each for each in args)
        return func(*wide, **kwargs or {}).to(dtype)
