"""The streaming calibration accumulator: tokens go in, their second moments stay."""

from collections.abc import Sequence

import torch
from torch import Tensor

from convexprune.errors import ProblemError
from convexprune.quadratic import Quadratic

STRIP = 256  # rows of a symmetric product that are computed at once


class Moments:
    """Second moments, as means over tokens, of an operator's pruned input x* and of the change d = x - x*.

    x [n] is the input that the operator sees in the dense network, x* the one that it sees once the operators before
    it are pruned. One pass, any split into batches; the tokens themselves are not kept. Keeping x - x* rather than x
    means that error correction never subtracts two nearly equal matrices.

    Args of the constructor: `width` n, the `dtype` of accumulation (float32 or float64), the `device`.
    """

    def __init__(self, width: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._gram = torch.zeros(width, width, dtype=dtype, device=device)
        self._cross: Tensor | None = None
        self._change: Tensor | None = None

    @property
    def width(self) -> int:
        """n, the number of inputs of the operator."""
        return self._gram.shape[0]

    @torch.no_grad()
    def add(self, pruned: Tensor, dense: Tensor | None = None) -> None:
        """Count a batch of inputs x* [... n]; `dense` [... n] are the same tokens' x if they differ.

        Raises:
            ProblemError: the inputs are not `width` wide, or dense and pruned differ in shape.
        """
        if pruned.shape[-1] != self.width or (dense is not None and dense.shape != pruned.shape):
            shape = None if dense is None else list(dense.shape)
            raise ProblemError(
                f"Inputs {list(pruned.shape)} and dense inputs {shape}; "
                f"these moments take equal shapes, {self.width} wide."
            )
        x = pruned.reshape(-1, self.width).to(self._gram)
        _add_square(self._gram, x)
        self.tokens += x.shape[0]
        if dense is None:
            return
        change = dense.reshape(-1, self.width).to(self._gram) - x
        if self._cross is None or self._change is None:
            self._cross, self._change = torch.zeros_like(self._gram), torch.zeros_like(self._gram)
        self._cross.addmm_(change.T, x)
        _add_square(self._change, change)

    @property
    def gram(self) -> Tensor:
        """mean x* x*' [n n]."""
        self._require_tokens()
        return _whole(self._gram / self.tokens)

    @property
    def cross(self) -> Tensor | None:
        """mean (x - x*) x*' [n n]; None if x = x* throughout."""
        return None if self._cross is None else self._cross / self.tokens

    @property
    def change(self) -> Tensor | None:
        """mean (x - x*) (x - x*)' [n n]; None if x = x* throughout."""
        return None if self._change is None else _whole(self._change / self.tokens)

    def is_finite(self) -> bool:
        """Whether every input counted so far was finite."""
        sums = [self._gram] if self._change is None else [self._gram, self._change]
        return all(bool(total.diagonal().isfinite().all()) for total in sums)

    def energy(self, weight: Tensor) -> Tensor:
        """mean |W x|^2 of each row [m]: the dense output's energy, the unit of relative errors."""
        energy = _row_form(weight, self.gram)
        if self.cross is not None and self.change is not None:
            energy = energy + 2 * _row_form(weight, self.cross) + _row_form(weight, self.change)
        return energy

    def reconstruction(self, weight: Tensor, correction: float = 1.0) -> Quadratic:
        """1/2 mean |V x* - W (x* + a (x - x*))|^2, about the anchor W [m n], with a = `correction` in [0, 1].

        a = 1 is error correction as in FISTAPruner (arXiv 2408.03728, Eq. 2): the target is the dense operator on the
        dense input. a = 0 asks only to reproduce the operator on its own, pruned input, as SparseGPT does.
        """
        weight = weight.to(self._gram)
        zero = torch.zeros_like(weight)
        if self.cross is None or self.change is None or correction == 0:
            return Quadratic(self.gram, zero, zero[:, 0], weight)
        energy = correction**2 * _row_form(weight, self.change)
        return Quadratic(self.gram, correction * weight @ self.cross, energy, weight)

    def counted_as(self, tokens: int) -> "Moments":
        """The same means, with the weight of `tokens` tokens in a sum.

        Raises:
            ProblemError: no token was seen.
        """
        self._require_tokens()
        share = tokens / self.tokens
        scaled = Moments(0, self._gram.dtype, self._gram.device)
        scaled.tokens = tokens
        scaled._gram = share * self._gram
        scaled._cross = None if self._cross is None else share * self._cross
        scaled._change = None if self._change is None else share * self._change
        return scaled

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(self.width, self._gram.dtype, self._gram.device)
        total.tokens = self.tokens + other.tokens
        total._gram = self._gram + other._gram
        total._cross = _sum(self._cross, other._cross)
        total._change = _sum(self._change, other._change)
        return total

    def _require_tokens(self) -> None:
        if self.tokens == 0:
            raise ProblemError("These moments have seen no token; call `add` first.")


def _add_square(total: Tensor, x: Tensor) -> None:
    """total += x' x, but only on and above the diagonal: the rest is symmetric, and would cost as much again."""
    for first in range(0, len(total), STRIP):
        total[first : first + STRIP, first:].addmm_(x[:, first : first + STRIP].T, x[:, first:])


def _whole(upper: Tensor) -> Tensor:
    """The symmetric matrix with that upper triangle."""
    return upper.triu() + upper.triu(1).T


def sampling_noise(folds: Sequence[Moments]) -> float:
    """How much of the correlations is noise of the sample, from two disjoint halves of the tokens: in [0, 1).

    With C_A, C_B the Gram matrices of the halves and C their mean, all in coordinates where C has a unit diagonal,

        noise = 1/4 |offdiag(C_A - C_B)|^2 / |offdiag(C)|^2

    estimates the intensity with which shrinking C towards the identity minimises the expected error (Ledoit and Wolf
    2004, with the variance taken from the halves because tokens are not independent).

    Raises:
        ProblemError: there are not two folds.
    """
    if len(folds) != 2:
        raise ProblemError(f"Sampling noise needs two folds; {len(folds)} given.")
    first, second = folds[0].gram, folds[1].gram
    mean = (first + second) / 2
    scale = mean.diagonal().clamp_min(torch.finfo(mean.dtype).tiny).sqrt()
    outer = scale[:, None] * scale
    off = ~torch.eye(len(mean), dtype=torch.bool, device=mean.device)
    signal = (mean / outer)[off].square().sum()
    noise = ((first - second) / outer)[off].square().sum() / 4
    return float((noise / signal).clamp(0, 0.99)) if signal > 0 else 0.0


def _row_form(weight: Tensor, matrix: Tensor) -> Tensor:
    """diag(W M W') [m]."""
    weight = weight.to(matrix)
    return ((weight @ matrix) * weight).sum(1)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
