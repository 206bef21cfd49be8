"""The streaming calibration accumulator: tokens go in, second moments stay."""

from collections.abc import Sequence

import torch
from torch import Tensor

from convexprune._device.precision import add_gram, bare_product
from convexprune.core._quadratic import Quadratic
from convexprune.core._symmetric import add_square, from_upper, quadratic_forms
from convexprune.errors import ProblemError


def weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply tokens [tokens n] by the square roots of their weights: a second moment then has the weights."""
    return x if weights is None else x * weights.reshape(-1, 1).sqrt()


class ErrorMoments:
    """Second moments of the error d that is to be made up for, and of the input x* [n], as sums over tokens.

    Of inputs, d = x - x* [n], they are sum d x*' and sum d d' [n n], and serve any weight. Of outputs, d [m] is the
    error of the outputs of one weight W [m n], W (x - x*) or the error of the residual stream: sum d x*' [m n] and sum
    d^2 [m]. The second kind needs less memory, and less work if 4 m < 3 n.
    """

    def __init__(self, cross: Tensor, change: Tensor) -> None:
        self.cross, self.change = cross, change

    @classmethod
    def zeros(cls, gram: Tensor, outputs: int | None = None) -> "ErrorMoments":
        """Return the moments of no token, for inputs with the second moments `gram` [n n]."""
        if outputs is None:
            return cls(torch.zeros_like(gram), torch.zeros_like(gram))
        return cls(gram.new_zeros(outputs, len(gram)), gram.new_zeros(outputs))

    @staticmethod
    def cheaper_in_output_space(outputs: int, inputs: int) -> bool:
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
        """Return sum (W d) x*' [m n] and sum (W d)^2 [m]; of errors of outputs, in the dtype of the weight."""
        if self.change.ndim == 1:
            return self.cross.to(weight), self.change.to(weight)
        weight = weight.to(self.cross)
        return bare_product(weight, self.cross), quadratic_forms(weight, from_upper(self.change))

    def is_finite(self) -> bool:
        return bool((self.change if self.change.ndim == 1 else self.change.diagonal()).isfinite().all())

    def rows(self, chosen: Tensor | slice) -> "ErrorMoments":
        return self if self.change.ndim == 2 else ErrorMoments(self.cross[chosen], self.change[chosen])

    def scaled(self, factors: Tensor) -> "ErrorMoments":
        """Return the moments for the weight with its rows times `factors` [m]."""
        if self.change.ndim == 2:
            return self
        factors = factors.to(self.change)
        return ErrorMoments(self.cross * factors[:, None], self.change * factors.square())

    def __add__(self, other: "ErrorMoments") -> "ErrorMoments":
        return ErrorMoments(self.cross + other.cross, self.change + other.change)


class Moments:
    """Second moments, as means over tokens, of an operator's pruned input x* and of its error d = x - x*.

    x [n] is the operator's input in the dense network, x* its input after earlier operators are pruned. A single pass,
    any split into batches; the tokens are not kept. With x - x* in place of x, error correction never subtracts two
    nearly equal matrices. `tokens` is the sum of the tokens' weights: the number of tokens without weights.

    Args:
        width: n.
        dtype: of accumulation, float32 or float64.
        device: of accumulation.
        outputs: m, if errors are of the outputs of a weight [m n] (see `ErrorMoments`).
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        outputs: int | None = None,
    ) -> None:
        if width < 0 or dtype not in (torch.float32, torch.float64):
            raise ProblemError(f"Moments of {width} inputs in {dtype}; needed are 0 or more, in float32 or float64.")
        self.tokens: float = 0
        self.errors: ErrorMoments | None = None
        self.outputs = outputs
        self.sum = torch.zeros(width, width, dtype=dtype, device=device)  # of x* x*', its upper triangle

    @property
    def width(self) -> int:
        """n, the number of inputs of the operator."""
        return len(self.sum)

    @torch.no_grad()
    def add(self, pruned: Tensor, dense: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Count a batch of inputs.

        Args:
            pruned: x* [... n].
            dense: x [... n] of the same tokens, if different.
            weights: w [...] of the tokens, not negative. A token of weight k counts as k equal tokens.

        Raises:
            ProblemError: the inputs are not `width` wide, or dense, pruned and weights differ in shape.
        """
        x = self._tokens(pruned, dense, weights)
        add_square(self.sum, weighted(x, weights))
        self.tokens += x.shape[0] if weights is None else float(weights.sum(dtype=torch.float64))
        if dense is not None:
            self.add_errors(x, dense.reshape(x.shape).to(self.sum) - x.to(self.sum), weights)

    @torch.no_grad()
    def add_errors(self, x: Tensor, error: Tensor, weights: Tensor | None = None) -> None:
        """Count the errors d [tokens n] or [tokens m] of tokens x* [tokens n] that were counted before.

        Args:
            x: the inputs x*.
            error: d.
            weights: w [tokens]; None means ones.
        """
        self.errors = self.errors or ErrorMoments.zeros(self.sum, self.outputs)
        self.errors.add(x.to(self.sum), error.to(self.sum), weights)

    @property
    def gram(self) -> Tensor:
        """Mean of x* x*' [n n] over one token or more; SparseGPT and GPTQ call a multiple of it the Hessian."""
        self._require_tokens()
        return from_upper(self.sum / self.tokens)

    @property
    def cross(self) -> Tensor | None:
        """mean (x - x*) x*' [n n], or mean d x*' [m n] of outputs; None if x = x* throughout."""
        return None if self.errors is None else self.errors.cross / self.tokens

    @property
    def change(self) -> Tensor | None:
        """mean (x - x*) (x - x*)' [n n], or mean d^2 [m] of outputs; None if x = x* throughout."""
        if self.errors is None:
            return None
        change = self.errors.change / self.tokens
        return change if change.ndim == 1 else from_upper(change)

    def is_finite(self) -> bool:
        """Return True if all inputs were finite."""
        return bool(self.sum.diagonal().isfinite().all()) and (self.errors is None or self.errors.is_finite())

    def energy(self, weight: Tensor, gram: Tensor | None = None) -> Tensor:
        """Return mean |W x|^2 by row [m], or with errors of outputs mean |W x* + d|^2: the unit of relative errors.

        Without errors x is not known, and x* takes its place: so with `error_correction=0`, and for experts.

        Args:
            weight: W [m n].
            gram: `gram`, if at hand.

        Returns:
            The energy.
        """
        energy = quadratic_forms(weight, self.gram if gram is None else gram)
        if self.errors is not None:
            cross, change = self.errors.project(weight)
            energy = energy + (2 * torch.linalg.vecdot(cross, weight.to(cross)) + change) / self.tokens
        return energy

    def reconstruction(self, weight: Tensor, alpha: float = 1.0, *, gram: Tensor | None = None) -> Quadratic:
        """Return the layer-wise reconstruction error 1/2 mean |V x* - W (x* + alpha (x - x*))|^2, a quadratic of V.

        With alpha = 1 the target is the dense operator on the dense input, the error correction of FISTAPruner (arXiv
        2408.03728, Eq. 2). With alpha = 0 the target is the dense operator on the pruned input, as in SparseGPT.

        Args:
            weight: W [m n], which is also the anchor.
            alpha: share of the error to correct, in [0, 1].
            gram: `gram`, if at hand.

        Returns:
            The quadratic of V [m n].
        """
        weight = weight.to(self.sum)
        gram = self.gram if gram is None else gram
        if self.errors is None or alpha == 0:
            zero = torch.zeros_like(weight)
            return Quadratic(gram, zero, zero[:, 0], weight, checked=False)
        cross, change = self.errors.project(weight)
        factor = alpha / self.tokens
        return Quadratic(gram, cross * factor, change * (alpha * factor), weight, checked=False)

    def rows(self, chosen: Tensor | slice) -> "Moments":
        """Return the moments for the rows `chosen` of the weight: numbers [k], a mask [m] or a slice."""
        return self._with(self.tokens, self.sum, None if self.errors is None else self.errors.rows(chosen))

    def scaled(self, factors: Tensor) -> "Moments":
        """Return the moments for the weight with its rows times `factors` [m]."""
        return self.with_errors(None if self.errors is None else self.errors.scaled(factors))

    def with_dead_inputs_filled(self, weight: Tensor) -> "Moments":
        """Give inputs that are always zero the mean energy of live inputs; a `weight` there is still compensated."""
        diagonal = self.sum.diagonal()
        dead = diagonal == 0
        energy = diagonal[~dead].mean() if bool(diagonal.any()) else self.tokens
        # The errors of the weight's dense outputs stay, whatever its columns at these inputs are by then.
        errors = None if self.errors is None else ErrorMoments(*self.errors.project(weight))
        return self._with(self.tokens, self.sum + (dead * energy).diag(), errors)

    def counted_as(self, tokens: float) -> "Moments":
        """Return the mean of x* x*' without errors, with a new count of `tokens` as weight in a sum."""
        self._require_tokens()
        return self._with(tokens, tokens / self.tokens * self.sum, None)

    def with_errors(self, errors: ErrorMoments | None) -> "Moments":
        """Return these moments of x* with new `errors` of the same tokens, or without errors."""
        return self._with(self.tokens, self.sum, errors)

    def __add__(self, other: "Moments") -> "Moments":
        both = [errors for errors in (self.errors, other.errors) if errors is not None]
        errors = both[0] + both[1] if len(both) == 2 else next(iter(both), None)
        return self._with(self.tokens + other.tokens, self.sum + other.sum, errors)

    def _with(self, tokens: float, gram: Tensor, errors: ErrorMoments | None) -> "Moments":
        other = Moments(0, gram.dtype, gram.device, self.outputs)
        other.tokens, other.sum, other.errors = tokens, gram, errors
        return other

    def _tokens(self, pruned: Tensor, dense: Tensor | None, weights: Tensor | None) -> Tensor:
        """Return x* as [tokens n], without change of dtype."""
        if pruned.shape[-1] != self.width or (dense is not None and dense.shape != pruned.shape):
            shape = None if dense is None else list(dense.shape)
            raise ProblemError(
                f"Inputs {list(pruned.shape)} and dense inputs {shape}; "
                f"these moments take equal shapes, {self.width} wide."
            )
        if weights is not None and weights.shape != pruned.shape[:-1]:
            raise ProblemError(
                f"Weights {list(weights.shape)} of inputs {list(pruned.shape)}: give one for each token."
            )
        return pruned.flatten(0, -2) if pruned.ndim > 1 else pruned[None]

    def _require_tokens(self) -> None:
        if self.tokens == 0:
            raise ProblemError("These moments have seen no token; call `add` first.")


def sampling_noise(folds: Sequence[Moments]) -> float:
    """Estimate the share of sampling noise in the correlations of the inputs, in [0, 1).

    With C_A, C_B the Gram matrices of two disjoint halves of the tokens and C their mean, all in coordinates where C
    has a unit diagonal,

        noise = 1/4 |offdiag(C_A - C_B)|^2 / |offdiag(C)|^2

    estimates the intensity with which shrinking C towards the identity minimises the expected error (Ledoit and Wolf
    2004, with the variance taken from the halves because tokens are not independent).
    """
    first, second = (fold.gram for fold in _two(folds))
    mean = (first + second) / 2
    scale = mean.diagonal().clamp_min(torch.finfo(mean.dtype).tiny).sqrt()
    outer = torch.outer(scale, scale)
    signal = mean.div_(outer).fill_diagonal_(0).square_().sum()
    noise = first.sub_(second).div_(outer).fill_diagonal_(0).square_().sum() / 4
    return float((noise / signal).clamp(0, 0.99)) if signal > 0 else 0.0


def burstiness(folds: Sequence[Moments]) -> float:
    """Estimate how unevenly tokens share the energy of an input: about (kurtosis - 1) / 2 of a typical one.

    It is the median over live inputs of tokens ((a - b) / (a + b))^2, with the energies a, b of an input in two
    disjoint halves of the tokens. Inputs that fire rarely have much of it, and inputs that follow a subject.
    """
    first, second = (fold.sum.diagonal() / fold.tokens for fold in _two(folds))
    live = first + second > 0
    differences = ((first - second) / (first + second))[live]
    return float(differences.square().median()) * sum(fold.tokens for fold in folds) if len(differences) else 0.0


def _two(folds: Sequence[Moments]) -> Sequence[Moments]:
    if len(folds) != 2:
        raise ProblemError(f"Noise and burstiness need two folds; {len(folds)} given.")
    return folds
