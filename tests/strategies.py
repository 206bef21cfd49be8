"""Random layers and what is built of them. Every draw is a kind, a shape and a seed, so that examples shrink."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from convexprune.core._moments import Moments
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic

LARGEST = 8  # rows and columns: enough for every case, small enough for the oracles
KINDS = ("full rank", "rank deficient", "ill-conditioned")
PENALTIES = ("L1", "L1 of scaled columns", "L1 of every entry", "Support")  # and, for regular Grams, "L1 in places"
STRENGTHS = (0.01, 0.1, 0.5, 1.2)  # of the least strength with a zero solution


@dataclass(frozen=True, eq=False)
class Layer:
    """An operator's weight [m n] and the same tokens' inputs [tokens n] in the pruned and in the dense network."""

    weight: Tensor
    pruned: Tensor
    dense: Tensor

    @property
    def moments(self) -> Moments:
        moments = Moments(self.weight.shape[1], self.weight.dtype)
        moments.add(self.pruned, None if self.dense is self.pruned else self.dense)
        return moments

    def quadratic(self, correction: float = 1.0) -> Quadratic:
        return self.moments.reconstruction(self.weight, correction)

    def targets(self, correction: float = 1.0) -> Tensor:
        """W (x* + a (x - x*)) [tokens m]."""
        return (self.pruned + correction * (self.dense - self.pruned)) @ self.weight.T

    def loss(self, weight: Tensor, correction: float = 1.0) -> Tensor:
        """1/2 mean |V x* - target|^2 of each row [m], from the tokens themselves."""
        return (self.pruned @ weight.T - self.targets(correction)).square().mean(0) / 2

    @property
    def energy(self) -> float:
        """mean |W x|^2: the unit of tolerances."""
        return float(self.targets().square().mean(0).sum())


def random(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(
    kind: str, m: int, n: int, seed: int, change: float = 0.3, tokens: int | None = None, mixing: float = 0.5
) -> Layer:
    """A random layer; `change` is how far dense and pruned inputs are apart, `mixing` how correlated inputs are."""
    if tokens is None:
        tokens = max(1, n // 2) if kind == "rank deficient" else 4 * n + 2
    inputs = random(seed, tokens, n) @ (torch.eye(n, dtype=torch.float64) + mixing * random(seed + 1, n, n))
    if kind == "ill-conditioned":
        scales = torch.logspace(-3, 3, n, dtype=torch.float64)
        inputs = inputs * scales[random(seed + 2, n).argsort()]
    dense = inputs if change == 0 else inputs + change * random(seed + 3, tokens, n) * inputs.std(0, correction=0)
    return Layer(random(seed + 4, m, n), inputs, dense)


def make_chain(m: int, n: int, seed: int, correlation: float, tokens: int) -> Layer:
    """A layer whose inputs are correlated with their neighbours, `correlation` to the power of the distance."""
    place = torch.arange(n, dtype=torch.float64)
    covariance = correlation ** (place[:, None] - place).abs()
    inputs = random(seed, tokens, n) @ torch.linalg.cholesky(covariance).T
    return Layer(random(seed + 4, m, n), inputs, inputs)


def make_penalty(name: str, quadratic: Quadratic, seed: int, strength: float = 0.1) -> AbstractPenalty:
    """A penalty that matters to the problem."""
    m, n = quadratic.shape
    if name == "Support":
        return Support(random(seed + 5, m, n) > 0)
    slope = quadratic.at(None).cross.abs()
    if name == "L1 of scaled columns":
        scale = quadratic.scale()
        return L1(strength * float((slope / scale).max()) * scale)
    if name == "L1 of every entry":
        return L1(strength * float(slope.max()) * random(seed + 6, m, n).abs().clamp_min(0.01))
    if name == "L1 in places":  # half of the entries are free
        return L1(strength * float(slope.max()) * random(seed + 6, m, n).clamp_min(0))
    return L1(strength * float(slope.max()))


def make_problem(
    kind: str, name: str, m: int, n: int, seed: int, strength: float, change: float
) -> tuple[Layer, Problem]:
    layer = make_layer(kind, m, n, seed, change)
    quadratic = layer.quadratic()
    return layer, Problem(quadratic, make_penalty(name, quadratic, seed, strength))


sizes = st.integers(1, LARGEST)
seeds = st.integers(0, 2**16)
changes = st.sampled_from((0.0, 0.3))
corrections = st.sampled_from((0.0, 0.5, 1.0))
layers = st.builds(make_layer, st.sampled_from(KINDS), sizes, sizes, seeds, changes)


def problems(
    kinds: tuple[str, ...] = KINDS, penalties: tuple[str, ...] = PENALTIES
) -> st.SearchStrategy[tuple[Layer, Problem]]:
    """A layer and a problem that is made of it."""
    kind, name = st.sampled_from(kinds), st.sampled_from(penalties)
    return st.builds(make_problem, kind, name, sizes, sizes, seeds, st.sampled_from(STRENGTHS), changes)
