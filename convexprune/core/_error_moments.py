"""The second moments of errors that earlier pruned operators caused."""

import torch
from torch import Tensor

from convexprune._device.precision import add_gram
from convexprune.core._triangle import add_square, from_upper, quadratic_forms


def weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply tokens [tokens n] by the square roots of their weights: a second moment then has the weights."""
    return x if weights is None else x * weights.reshape(-1, 1).sqrt()


class ErrorMoments:
    """Second moments of the error d that is to be made up for, and of the input x* [n], as sums over tokens.

    Of inputs, d = x - x* [n], they are sum d x*' and sum d d' [n n], and serve any weight. Of outputs, d [m] is the
    error of the outputs of one weight W [m n], W (x - x*) or the error of the residual stream: sum d x*' [m n] and sum
    d^2 [m]. The second kind needs less memory, and less work if 4 m < 3 n.

    Args:
        cross: sum d x*' [n n] or [m n].
        change: sum d d' [n n] or sum d^2 [m].
    """

    def __init__(self, cross: Tensor, change: Tensor) -> None:
        self.cross, self.change = cross, change

    @classmethod
    def zeros(cls, gram: Tensor, outputs: int | None = None) -> "ErrorMoments":
        """Return the moments of no token.

        Args:
            gram: the second moments [n n] of the inputs, for shape, dtype and device.
        """
        if outputs is None:
            return cls(torch.zeros_like(gram), torch.zeros_like(gram))
        return cls(gram.new_zeros(outputs, len(gram)), gram.new_zeros(outputs))

    @staticmethod
    def cheaper_in_output_space(outputs: int, inputs: int) -> bool:
        """Return True if moments of the outputs' errors cost less than moments of the inputs' errors.

        Returns:
            True if 4 m < 3 n.
        """
        return 4 * outputs < 3 * inputs

    def add(self, x: Tensor, error: Tensor, weights: Tensor | None = None) -> None:
        """Count tokens: inputs x* [tokens n], errors d [tokens n] or [tokens m], and weights [tokens] if not ones."""
        x, error = weighted(x, weights), weighted(error, weights)
        if self.change.ndim == 2:
            add_square(self.change, error)
        else:
            self.change += error.square().sum(0)
        add_gram(self.cross, error, x)

    def project(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moments in the output space of a weight.

        Args:
            weight: W [m n]. For errors of outputs only its dtype and device count.

        Returns:
            sum (W d) x*' [m n] and sum (W d)^2 [m].
        """
        if self.change.ndim == 1:
            return self.cross.to(weight), self.change.to(weight)
        weight = weight.to(self.cross)
        return weight @ self.cross, quadratic_forms(weight, from_upper(self.change))

    def is_finite(self) -> bool:
        """Return True if all errors were finite."""
        return bool((self.change if self.change.ndim == 1 else self.change.diagonal()).isfinite().all())

    def rows(self, chosen: Tensor | slice) -> "ErrorMoments":
        """The moments for the rows `chosen` of the weight: numbers [k], a mask [m] or a slice."""
        return self if self.change.ndim == 2 else ErrorMoments(self.cross[chosen], self.change[chosen])

    def scaled(self, factors: Tensor) -> "ErrorMoments":
        """Return the moments for the weight with its rows times `factors` [m]."""
        if self.change.ndim == 2:
            return self
        factors = factors.to(self.change)
        return ErrorMoments(self.cross * factors[:, None], self.change * factors.square())

    def __add__(self, other: "ErrorMoments") -> "ErrorMoments":
        return ErrorMoments(self.cross + other.cross, self.change + other.change)
