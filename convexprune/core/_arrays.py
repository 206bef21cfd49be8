"""Tensors, or arrays in their place."""

import numpy as np
import torch
from torch import Tensor

from convexprune.errors import ProblemError

Array = Tensor | np.ndarray


def as_tensor(name: str, value: object) -> Tensor:
    """Return a tensor unchanged; convert a NumPy array or nested lists of numbers."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise ProblemError(
            f"`{name}` is a {type(value).__name__}; needed is a tensor or an array of numbers."
        ) from cause
