"""The arrays that users bring, as tensors, and tensors as the arrays that they brought."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexprune.errors import ProblemError

Array = Tensor | np.ndarray


def as_tensor(name: str, value: object) -> Tensor:
    """Return a tensor as it is; an array, a data frame or nested lists of numbers as a tensor."""
    try:
        return torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as cause:
        raise ProblemError(
            f"`{name}` is a {type(value).__name__}; needed is a tensor or an array of numbers."
        ) from cause


def as_floats(name: str, value: object) -> Tensor:
    """Return `as_tensor`, with whole numbers and booleans in float64."""
    tensor = as_tensor(name, value)
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()


@dataclass(frozen=True, eq=False)
class DataFormat:
    """The form in which a problem was stated, so that its answer has the same.

    Args:
        numpy: NumPy, SciPy or pandas, not torch.
        flat: one response, without an axis for the rows.
        means: of the inputs [n] and of the targets [m], if both were centred for an intercept.
    """

    numpy: bool = False
    flat: bool = False
    means: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, targets: object, means: tuple[Tensor, Tensor] | None = None) -> "DataFormat":
        """Return the form of the `targets`."""
        if isinstance(targets, Tensor) and targets.ndim == 2 and means is None:
            return TENSORS
        return cls(not isinstance(targets, Tensor), np.ndim(targets) == 1, means)  # pyright: ignore[reportArgumentType]

    def weight(self, weight: Tensor) -> Any:
        """Return V [m n] in this form: [n] if it is flat."""
        return self._array(weight[0] if self.flat else weight)

    def intercept(self, weight: Tensor) -> Any:
        """Return mean y - V mean x of each row [m], a number if the form is flat; None without an intercept."""
        if self.means is None:
            return None
        inputs, targets = self.means
        offset = targets.double() - weight.double() @ inputs.double()
        return float(offset) if self.flat else self._array(offset.to(weight))

    def _array(self, tensor: Tensor) -> Any:
        return tensor.cpu().numpy() if self.numpy else tensor


TENSORS = DataFormat()
