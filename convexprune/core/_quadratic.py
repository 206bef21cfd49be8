"""The one smooth term: a convex quadratic of the weight whose Gram matrix is shared by all rows."""

from dataclasses import InitVar, dataclass, field
from functools import cached_property
from math import inf
from typing import Any, Self

import torch
from torch import Tensor

from convexprune._device.capabilities import has_bfloat16
from convexprune.core._arrays import Array, as_tensor
from convexprune.core._consistency import DTYPES, fitting, is_sum_of_squares, symmetric
from convexprune.core._factor import cholesky
from convexprune.core._spectrum import largest_eigenvalue, power_of_two
from convexprune.errors import ProblemError

_UNKNOWN: Any = object()  # of a factor that was not tried: None says that there is none


@dataclass(eq=False)
class Cache:
    """What does not depend on the anchor, computed at most once for all quadratics that differ only in it.

    Args:
        gram: H [n n].
        precision: the rounding error of the dtype in which the tensors were given.
        energy: the energy [m] that was given.
        envelope_of: the quadratic whose Moreau envelope this is, and the stiffness; None for any other quadratic.
        target_energy: see `Quadratic.target_energy`; None until it is computed.
        is_sum_of_squares: see `Quadratic.is_sum_of_squares`; None until it is computed.
        factor: see `Quadratic.factor`.
    """

    gram: Tensor
    precision: float
    energy: Tensor
    envelope_of: "tuple[Quadratic, float] | None" = None
    target_energy: float | None = None
    is_sum_of_squares: bool | None = None
    factor: Tensor | None = _UNKNOWN

    @cached_property
    def largest_eigenvalue(self) -> float:
        """An upper estimate of the largest eigenvalue of H."""
        return largest_eigenvalue(self.gram)

    @cached_property
    def gram_of_steps(self) -> Tensor:
        """H [n n] in the dtype in which steps are multiplied: bfloat16 where the device has it, else H itself."""
        coarse = self.gram.dtype == torch.float32 and has_bfloat16(self.gram.device)
        return self.gram.bfloat16() if coarse else self.gram


@dataclass(frozen=True, eq=False)
class Quadratic:
    """A sum of squares of the weight V [m n], written about an anchor A [m n].

    With D = V - A, gram H [n n] (symmetric, positive semidefinite), cross G [m n] and energy e [m]:

        q(V) = 1/2 tr(D H D') - tr(D G') + 1/2 sum(e)

    Row i is 1/2 |z_i - d_i X|^2 with H = X X', G = Z X', e_i = |z_i|^2: the input X and the target Z are not needed.
    H is what SparseGPT and GPTQ call the Hessian, up to a factor. Everything is computed from the small D, so that
    nothing cancels. Quadratics are closed under addition and non-negative scaling.

    The tensors, or NumPy arrays, are float32 or float64, all alike.

    Args:
        gram: H [n n].
        cross: G [m n].
        energy: e [m].
        anchor: A [m n], the point near which the solution is expected (the dense weight); None is zero.
        bound: an upper bound on H's eigenvalues, if one is known.
        cache: what has been computed of the function, for all quadratics that write it about other anchors.
        checked: whether to check cheaply that the tensors can be those of a sum of squares (`core._consistency`);
            a certificate checks it in full. False is for what was computed from tokens or from another quadratic,
            because the check stops a GPU.

    Raises:
        ProblemError: the shapes or dtypes do not fit, or the tensors are those of no sum of squares.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    anchor: Tensor | None = None
    bound: float | None = None
    cache: "Cache | None" = field(default=None, repr=False)
    checked: InitVar[bool] = True

    def __post_init__(self, checked: bool) -> None:
        names = ("gram", "cross", "energy", "anchor")
        for name, tensor in zip(names, fitting(*(getattr(self, name) for name in names)), strict=True):
            object.__setattr__(self, name, tensor)
        if checked:
            object.__setattr__(self, "gram", symmetric(self.gram, self.cross, self.energy, self.anchor))
        if self.cache is None:
            object.__setattr__(self, "cache", Cache(self.gram, torch.finfo(self.energy.dtype).eps, self.energy))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the operator."""
        return self.cross.shape[0], self.cross.shape[1]

    @classmethod
    def least_squares(cls, inputs: Array, targets: Array, anchor: Array | None = None) -> Self:
        """The mean squared error 1/2 mean_t |targets_t - V inputs_t|^2 of a linear map V.

        Args:
            inputs: [tokens n].
            targets: [tokens m].
            anchor: a good guess [m n] where the fit is nearly exact. In float32 an error of less than 1e-7 of the
                targets' energy is lost otherwise, and no certificate is small.

        Returns:
            The quadratic of V [m n].

        Raises:
            ProblemError: no tokens, values that are not finite, or shapes or dtypes that do not fit.
        """
        x, y = as_tensor("inputs", inputs), as_tensor("targets", targets)
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
            shapes = f"Inputs {list(x.shape)} and targets {list(y.shape)}"
            raise ProblemError(f"{shapes}; needed are [tokens inputs] and [tokens outputs] of one token or more.")
        if x.dtype not in DTYPES or x.dtype != y.dtype:
            raise ProblemError(f"Inputs are {x.dtype}, targets {y.dtype}; both must be float32, or both float64.")
        about = None if anchor is None else as_tensor("anchor", anchor)
        if about is not None:
            y = y - x @ about.T
        if not bool(x.isfinite().all() & y.isfinite().all()):
            raise ProblemError("Inputs or targets hold a value that is NaN or infinite.")
        tokens, gram = len(x), x.T @ x / len(x)
        return cls((gram + gram.T) / 2, y.T @ x / tokens, y.square().sum(0) / tokens, about, checked=False)

    @classmethod
    def damping(cls, anchor: Tensor, strength: Tensor) -> Self:
        """A pull towards the anchor: 1/2 sum_ij strength_j (V_ij - A_ij)^2.

        Args:
            anchor: A [m n].
            strength: [n], not negative.

        Returns:
            The quadratic, to be added to another one.

        Raises:
            ProblemError: a strength is negative.
        """
        if not bool((strength >= 0).all()):
            raise ProblemError(f"Damping must not be negative; the least entry is {float(strength.min()):.3g}.")
        zero = torch.zeros_like(anchor)
        return cls(torch.diag(strength), zero, zero[:, 0], anchor, checked=False)

    def displacement(self, weight: Tensor) -> Tensor:
        """V - A [m n] for V = `weight` [m n]."""
        return weight if self.anchor is None else weight - self.anchor

    def residual(self, weight: Tensor) -> Tensor:
        """The negative gradient of q, K = G - D H [m n], at `weight` [m n]."""
        return torch.addmm(self.cross, self.displacement(weight), self.gram, alpha=-1)

    def residual_after(self, residual: Tensor, step: Tensor) -> Tensor:
        """The residual after a small step on the way to an answer.

        The product is in bfloat16 where the device has such products (`has_bfloat16`). Its error is at most 2^-8 of the
        change, which is small where the step is. Certificates and reports use `residual`.

        Args:
            residual: K [m n] before the step.
            step: V - V_0 [m n].

        Returns:
            K - step H [m n].
        """
        gram = self._cache.gram_of_steps
        change = (step.to(gram.dtype) @ gram).to(residual.dtype)
        return torch.sub(residual, change, out=change)

    def values(self, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        """q of each row.

        Args:
            weight: V [m n].
            residual: the residual at `weight` [m n]; if it is known, no product is needed.

        Returns:
            [m], not negative.
        """
        residual = self.residual(weight) if residual is None else residual
        values = self.energy - torch.linalg.vecdot(self.displacement(weight), self.cross + residual)
        return values.clamp_min(0) / 2  # a sum of squares; rounding may say otherwise

    @property
    def lipschitz(self) -> float:
        """An upper estimate of H's largest eigenvalue: the bound, or what the power method says."""
        if self.bound is not None:
            return self.bound
        return self._cache.largest_eigenvalue

    def scale(self) -> Tensor:
        """sqrt(H_jj) [n], and 1 for a dead input: in coordinates V * scale the Gram matrix has a unit diagonal."""
        diagonal = self.gram.diagonal()
        return torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt()

    def scaled(self, scale: Tensor) -> Self:
        """The same function of U = V * scale.

        Args:
            scale: [n], positive.

        Returns:
            The quadratic of U [m n].
        """
        if bool((scale == 1).all()):
            return self  # and what is cached stays
        anchor = None if self.anchor is None else self.anchor * scale
        tensors = (self.gram / scale).div_(scale[:, None]), self.cross / scale, self.energy, anchor
        return self._as_precise(*tensors)

    @property
    def target_energy(self) -> float:
        """The sum of squares at V = 0: the energy of the whole target, a unit for residuals."""
        if self._cache.target_energy is None:
            self._cache.target_energy = float(2 * self.values(torch.zeros_like(self.cross)).sum())
        return self._cache.target_energy

    @cached_property
    def double(self) -> Self:
        """The same function in float64, for certificates."""
        if self.gram.dtype == torch.float64:
            return self
        anchor = None if self.anchor is None else self.anchor.double()
        tensors = self.gram.double(), self.cross.double(), self.energy.double(), anchor
        return self._as_precise(*tensors)

    @cached_property
    def unit_free(self) -> tuple[Self, Tensor]:
        """The same function, in float64, of U = V * scale, and that scale [n]: sqrt(H_jj) up to a power of two.

        Nothing is rounded on the way, and the units of inputs and weights make no difference to what is computed there.
        """
        scale = power_of_two(self.scale().double())
        gram = self.gram.to(torch.float64, copy=True).div_(scale).div_(scale[:, None])
        anchor = None if self.anchor is None else self.anchor * scale
        tensors = gram, self.cross / scale, self.energy.double(), anchor
        return self._as_precise(*tensors), scale

    @property
    def rounding(self) -> Tensor:
        """The resolution of q [m]: four rounding errors of the energy, in the dtype that it was given in."""
        return 4 * self._cache.precision * self._cache.energy.to(self.energy)

    @property
    def is_sum_of_squares(self) -> bool:
        """Whether H is positive semidefinite and every energy large enough for its cross term, up to rounding.

        Only of a quadratic whose H has a diagonal near one, or zero (`unit_free`).
        """
        if self._cache.is_sum_of_squares is None:
            unit = self.energy if self.anchor is None else self.energy + self.anchor.square().sum(1)
            self._cache.is_sum_of_squares = is_sum_of_squares(
                self.gram, self.cross, self.energy, unit, self._cache.precision, self.factor
            )
        return self._cache.is_sum_of_squares

    @property
    def factor(self) -> Tensor | None:
        """Lower triangular F [n n] with F F' <= H, or None if H is not safely positive definite.

        n rounding errors of the largest entry are taken from the diagonal, for the error of the factorisation itself,
        so that |F^-1 k|^2 errs upwards. That is more than is observed, and less than the n (n + 2) that are proven
        (Higham 2002, theorem 10.3). Inputs that are always zero get a one on the diagonal, so that they do not spoil
        the rest; `inverse_form` handles them.
        """
        if self._cache.factor is _UNKNOWN:
            diagonal = self.gram.diagonal()
            margin = self.gram.shape[0] * torch.finfo(self.gram.dtype).eps * float(diagonal.max())
            self._cache.factor = cholesky(self.gram + torch.where(self.dead, 1.0, -margin).to(diagonal).diag())
        return self._cache.factor

    @property
    def dead(self) -> Tensor:
        """Which inputs are always zero [n]: the function does not depend on their weights."""
        return (self.gram.diagonal() == 0) & (self.cross == 0).all(0)

    def inverse_form(self, gradient: Tensor) -> Tensor:
        """An upper bound on 1/2 k H^-1 k' of each row k.

        The conjugate of an envelope is that of the function it relaxes plus |k|^2 / (2 stiffness), so that one
        factorisation serves all envelopes.

        Args:
            gradient: the rows k [m n].

        Returns:
            [m]; inf where H is not safely positive definite.
        """
        if self._cache.envelope_of is not None:
            inner, stiffness = self._cache.envelope_of
            return inner.inverse_form(gradient) + torch.linalg.vecdot(gradient, gradient) / (2 * stiffness)
        if self.factor is None:
            return torch.where((gradient == 0).all(1), 0.0, inf)
        solved = torch.linalg.solve_triangular(self.factor, gradient.T, upper=False)
        return torch.where(((gradient != 0) & self.dead).any(1), inf, solved.square_().sum(0) / 2)

    def envelope(self, stiffness: float) -> Self:
        """The Moreau envelope  min_U q(U) + stiffness/2 |U - V|^2, again a quadratic of V.

        With R = (H + stiffness I)^-1:  gram s - s^2 R,  cross s G R,  energy e - diag(G R G').  Its eigenvalues lie
        below both H's and `stiffness`, so few iterations solve it; the inner U is V + residual(V) / stiffness.
        Splitting the weight like this is the relaxation of Zheng et al. (arXiv 1807.05411, SR3).

        Args:
            stiffness: positive.

        Returns:
            The quadratic of V [m n].

        Raises:
            ProblemError: H + stiffness I is not positive definite.
        """
        inverse = self.shifted_inverse(stiffness)
        image = self.cross @ inverse
        energy = self.energy - torch.linalg.vecdot(image, self.cross)
        gram = inverse.mul_(-(stiffness**2))
        gram.diagonal().add_(stiffness)
        tensors = gram, image.mul_(stiffness), energy.clamp_min(0), self.anchor
        relaxed = type(self)(*tensors, bound=stiffness, checked=False)
        relaxed._cache.envelope_of = self, stiffness
        return relaxed

    def shifted_inverse(self, shift: float) -> Tensor:
        """The inverse of H + shift I, by a Cholesky factor.

        Args:
            shift: not negative.

        Returns:
            (H + shift I)^-1 [n n].

        Raises:
            ProblemError: H + shift I is not positive definite.
        """
        shifted = self.gram.clone()
        shifted.diagonal().add_(shift)
        factor = cholesky(shifted)
        if factor is None:
            raise ProblemError(f"The Gram matrix plus {shift} is not positive definite; it is no Gram matrix.")
        return torch.cholesky_inverse(factor)

    def at(self, anchor: Tensor | None, residual: Tensor | None = None) -> Self:
        """The same function written about another anchor.

        Args:
            anchor: [m n]; None is zero.
            residual: the residual at `anchor` [m n]; if it is known, no product is needed.

        Returns:
            The quadratic; it shares the cache.
        """
        if anchor is self.anchor:
            return self
        point = torch.zeros_like(self.cross) if anchor is None else anchor
        residual = self.residual(point) if residual is None else residual
        energy = 2 * self.values(point, residual)
        return type(self)(self.gram, residual, energy, anchor, self.bound, self.cache, checked=False)

    def rows(self, chosen: Tensor | slice) -> Self:
        """The quadratic of the rows `chosen` alone: numbers [k], a mask [m] or a slice."""
        anchor = None if self.anchor is None else self.anchor[chosen]
        cache = Cache(self.gram, self._cache.precision, self._cache.energy[chosen])
        return type(self)(self.gram, self.cross[chosen], self.energy[chosen], anchor, self.bound, cache, checked=False)

    def columns(self, chosen: Tensor) -> Self:
        """The quadratic of the inputs `chosen` [k] alone, where the weights of all others stay at the anchor."""
        anchor = None if self.anchor is None else self.anchor[:, chosen]
        return self._as_precise(self.gram[chosen][:, chosen], self.cross[:, chosen], self.energy, anchor)

    def _as_precise(self, gram: Tensor, cross: Tensor, energy: Tensor, anchor: Tensor | None) -> Self:
        """Another quadratic, whose rounding errors are those of the tensors that this one was given."""
        cache = Cache(gram, self._cache.precision, self._cache.energy)
        return type(self)(gram, cross, energy, anchor, cache=cache, checked=False)

    @property
    def _cache(self) -> "Cache":
        assert self.cache is not None
        return self.cache

    def __add__(self, other: Self) -> Self:
        other = other.at(self.anchor)
        tensors = self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.anchor
        return type(self)(*tensors, checked=False)

    def __mul__(self, factor: float) -> Self:
        if not factor >= 0:
            raise ProblemError(f"A quadratic times {factor} is not a sum of squares; the factor must be >= 0.")
        return type(self)(self.gram * factor, self.cross * factor, self.energy * factor, self.anchor, checked=False)

    __rmul__ = __mul__
