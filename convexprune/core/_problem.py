"""The abstract layer-wise problem."""

from dataclasses import dataclass

from torch import Tensor

from convexprune.core._abstract_penalty import AbstractPenalty, require_norm
from convexprune.core._arrays import Array, as_tensor
from convexprune.core._quadratic import Quadratic
from convexprune.errors import ProblemError


@dataclass(frozen=True, eq=False)
class Problem:
    """min_V q(V) + p(V) over weights V [m n].

    Args:
        quadratic: q.
        penalty: p, of weights of the same shape.
    """

    quadratic: Quadratic
    penalty: AbstractPenalty

    def __post_init__(self) -> None:
        if not isinstance(self.quadratic, Quadratic) or not isinstance(self.penalty, AbstractPenalty):
            given = f"{type(self.quadratic).__name__} and {type(self.penalty).__name__}"
            raise ProblemError(
                f"Problem({given}): needed are a Quadratic and a penalty (L1, Support, ...), in this order."
            )
        self.penalty.check(self.shape)
        if not type(self.penalty).__module__.startswith(f"{__package__}."):
            require_norm(self.penalty, self.quadratic.cross)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the operator."""
        return self.quadratic.shape

    def value(self, weight: Array) -> float:
        """The objective at `weight` [m n]."""
        point = self.admit(weight).to(self.quadratic.cross)
        return float((self.quadratic.values(point) + self.penalty.values(point)).sum())

    def admit(self, weight: Array) -> Tensor:
        """Return a weight as a tensor [m n] on the problem's device, in the weight's dtype.

        Args:
            weight: a tensor or an array [m n], or [n] of one row.

        Returns:
            The tensor.

        Raises:
            ProblemError: `weight` is not [m n], or no floating-point numbers.
        """
        point = as_tensor("weight", weight)
        point = point[None] if point.ndim == 1 and self.shape[0] == 1 else point
        if tuple(point.shape) != self.shape or not point.is_floating_point():
            raise ProblemError(
                f"The weight is {point.dtype} {list(point.shape)}; this problem needs {list(self.shape)} "
                "[outputs inputs], floating point."
            )
        return point.to(self.quadratic.cross.device)
