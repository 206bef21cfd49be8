"""How good could any pruning be? A certified lower bound on the error of the best weight in a pattern."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from convexprune.errors import ProblemError
from convexprune.pattern import AbstractPattern, SemiStructured, Unstructured
from convexprune.quadratic import Quadratic

BISECTIONS = (60, 12)  # of the price of a non-zero: at the first iteration, and from the price before
LEAST_LENGTH = 1e-6  # of a Newton step: shorter ones are not worth a factorisation
WINDOW = 0.5  # by which the logarithm of a price may move between two iterations


@dataclass(frozen=True)
class PruningBound:
    """No weight in the pattern has a squared error (mean |V x* - target|^2, summed over `rows`) below `lower`.

    `error` is what a pruner achieved on the same rows with the same number of non-zeros.
    """

    error: float
    lower: float
    rows: int

    @property
    def ratio(self) -> float:
        """lower / error in [0, 1]: at least this share of the error is unavoidable. 1 where both are zero."""
        return self.lower / self.error if self.error > 0 else 1.0


@dataclass(frozen=True)
class LowerBound:
    """The perspective relaxation of the cardinality-constrained problem, with a split that is fitted to it.

    Take a diagonal split B >= 0 with H - B positive semidefinite. At any weight V0 with negative gradient K,

        q(V) >= q(V0) - <K, V - V0> + 1/2 sum_j B_j (V_j - V0_j)^2

    and the right-hand side is separable: its least value over a pattern that keeps k entries of a line (a row, a
    group of n:m, or all rows) is known in closed form (`lower_bound`). So any V0 and any split give a valid bound.
    The best V0 minimises the perspective relaxation (reverse Huber; Pilanci, Wainwright and El Ghaoui 2015; Dong, Chen
    and Linderoth 2015, arXiv 1510.06083), the best split is the dual of its semidefinite relaxation. `rounds` alternate
    between `iterations` of accelerated proximal gradient on V0, and a Newton step on

        max_B  <c, B> + barrier log det(H - B),     c_j = V_j^2 (1 / z_j - 1) / 2

    where c is the derivative of the relaxed value by B; `barriers` falls geometrically. `per_row`: every row has its
    own split, which is tighter and costs two factorisations [n n] a row and round; else all rows share one.
    """

    rounds: int = 12
    iterations: int = 100
    last_iterations: int = 1000
    barriers: tuple[float, float] = (0.1, 1e-3)
    per_row: bool = True

    @torch.no_grad()
    def of(self, quadratic: Quadratic, pattern: AbstractPattern, weight: Tensor) -> PruningBound:
        """The bound for a pruned `weight` [m n], whose rows may be a sample of an operator's rows.

        A quota of the whole matrix is then the number of non-zeros that `weight` has in these rows.

        Raises:
            ProblemError: the weight is not shaped like the quadratic, or has more non-zeros than the pattern allows.
            PatternError: the pattern does not fit.
        """
        if tuple(weight.shape) != quadratic.shape:
            raise ProblemError(f"The weight is {list(weight.shape)}; this quadratic needs {list(quadratic.shape)}.")
        lines, kept = budget(pattern, weight)
        error = 2 * float(quadratic.double.values(weight.double()).sum())
        q = without_dead_inputs(quadratic.double)
        scale = q.scale()
        q, start = q.scaled(scale), weight.double() * scale
        split = first_split(q.gram)
        if split is None:
            return PruningBound(error, 0.0, len(weight))
        lower = self._ascend(q, split.expand(start.shape), start, lines, kept)
        return PruningBound(error, 2 * lower, len(weight))

    def _ascend(self, q: Quadratic, split: Tensor, weight: Tensor, lines: "Lines", kept: Tensor) -> float:
        best, average = 0.0, None
        for number in range(self.rounds + 1):
            last = number == self.rounds
            weight, share, _ = relax(q, split, weight, lines, kept, self.last_iterations if last else self.iterations)
            split = safe_split(q.gram, split)
            best = max(best, lower_bound(q, split, weight, lines, kept))
            if last:
                break
            gain = split_gain(weight, share)
            gain = gain if self.per_row else gain.mean(0, keepdim=True)
            average = gain if average is None else average + (gain - average) * (2 / (number + 2))
            barrier = self.barriers[0] * (self.barriers[1] / self.barriers[0]) ** (number / max(1, self.rounds - 1))
            rows = split if self.per_row else split[:1]
            fitted = [fit_split(q.gram, b, c, barrier) for b, c in zip(rows, average, strict=True)]
            split = torch.stack(fitted).expand(weight.shape)
        return best


Lines = Callable[[Tensor], Tensor]


def budget(pattern: AbstractPattern, weight: Tensor) -> tuple[Lines, Tensor]:
    """How to view a weight [m n] as lines, and how many non-zeros each line may have [lines 1].

    Raises:
        ProblemError: the pattern has no lines (a stack: take its operators one by one), or the weight breaks it.
        PatternError: the pattern does not fit.
    """
    m, n = weight.shape
    if isinstance(pattern, SemiStructured):
        pattern.check(m, n)
        width, kept = pattern.group, pattern.kept
    elif isinstance(pattern, Unstructured):
        whole = pattern.quota == "matrix"
        width = m * n if whole else n
        kept = int((weight != 0).sum()) if whole else n - pattern.zeros(1, n)
    else:
        raise ProblemError(f"A bound needs an unstructured or n:m pattern of one operator; this is {pattern}.")

    def lines(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, width)

    counts = (lines(weight) != 0).sum(1)
    if bool((counts > kept).any()):
        raise ProblemError(f"The weight keeps up to {int(counts.max())} in a line of {width}; {pattern} keeps {kept}.")
    return lines, torch.full((len(counts), 1), kept, dtype=torch.float64, device=weight.device)


def without_dead_inputs(q: Quadratic) -> Quadratic:
    """q + 1/2 |V|^2 on the inputs that are always zero: the best pruning is the same, with zeros there."""
    dead = q.gram.diagonal() == 0
    if not bool(dead.any()):
        return q
    q = q.at(None if q.anchor is None else q.anchor.masked_fill(dead, 0))
    return type(q)(q.gram + dead.to(q.gram).diag(), q.cross, q.energy, q.anchor)


def first_split(gram: Tensor) -> Tensor | None:
    """A split [n] to begin with: 1 / [H^-1]_jj, shrunk until H - B is positive definite; None if H is not."""
    margin = rounding(gram)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram - margin * identity)
    if int(info):
        return None
    split = 1 / torch.cholesky_inverse(factor).diagonal()
    root = split.sqrt()
    return split * float(torch.linalg.eigvalsh(gram / root / root[:, None])[0]) * 0.99


def safe_split(gram: Tensor, split: Tensor) -> Tensor:
    """The split [m n] shrunk, row by row, until a Cholesky factorisation proves H - B positive semidefinite."""
    distinct = split[:1] if split.stride(0) == 0 else split
    rows = []
    for row in distinct:
        shrink = 1.0
        while not _is_below(gram, row * shrink):
            shrink = shrink * 0.999 if shrink > 0.9 else shrink * 0.5 if shrink > 1e-9 else 0.0
        rows.append(row * shrink)
    return torch.stack(rows).expand(split.shape)


def split_gain(weight: Tensor, share: Tensor) -> Tensor:
    """V^2 (1 / z - 1) / 2 [m n], the derivative of the relaxed value by the split; over its mean in each row."""
    gain = torch.where(share > 0, weight.square() * (1 / share.clamp_min(1e-9) - 1) / 2, 0.0)
    return gain / gain.mean(1, keepdim=True).clamp_min(torch.finfo(gain.dtype).tiny)


def fit_split(gram: Tensor, split: Tensor, gain: Tensor, barrier: float) -> Tensor:
    """A Newton step on  <gain, B> + barrier (log det(H - B) + 1/10 sum log B)  from a feasible split [n]."""
    factor, info = torch.linalg.cholesky_ex(gram - split.diag())
    if int(info):
        return split
    inverse = torch.cholesky_inverse(factor)
    slope = gain - barrier * inverse.diagonal() + barrier / 10 / split
    hessian = barrier * (inverse.square() + (0.1 / split.square()).diag())
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info):
        return split
    move = torch.cholesky_solve(slope[:, None], factor)[:, 0]
    shrinking = move < 0
    length = min(1.0, 0.9 * float((-split / move)[shrinking].min())) if bool(shrinking.any()) else 1.0
    while length > LEAST_LENGTH:
        if int(torch.linalg.cholesky_ex(gram - (split + length * move).diag())[1]) == 0:
            return split + (length if length == 1 else 0.9 * length) * move
        length *= 0.7
    return split


def relax(
    q: Quadratic, split: Tensor, weight: Tensor, lines: Lines, kept: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise  q(V) + 1/2 sum_ij B_ij V_ij^2 (1 / z_ij - 1)  over V and 0 <= z <= 1 with sum of z in a line <= kept.

    Accelerated proximal gradient on q - 1/2 B V^2 in the metric L - B, restarted per row; the price of a non-zero is
    found inside the prox, by bisection. Returns V, z [m n] and that price [lines 1].
    """
    lipschitz = max(q.lipschitz, 1.01 * float(split.max()))
    metric = lipschitz - split
    point, old = weight, weight
    t = torch.ones(len(weight), 1, dtype=weight.dtype, device=weight.device)
    price: Tensor | None = None
    share = torch.ones_like(weight)
    for _ in range(iterations):
        target = point + (q.residual(point) + split * point) / metric
        price = _price(lines(target.abs()), lines(metric), lines(split), kept, price)
        share = _share(lines(target.abs()), lines(metric), lines(split), price).reshape(weight.shape)
        new = target * metric * share / (metric * share + split)
        move = new - old
        t = torch.where(((point - new) * move).sum(1, keepdim=True) > 0, 1.0, t)
        following = (1 + (1 + 4 * t.square()).sqrt()) / 2
        point = new + (t - 1) / following * move
        t, old = following, new
    assert price is not None, "no iteration"
    return old, share, price.exp()


def lower_bound(q: Quadratic, split: Tensor, weight: Tensor, lines: Lines, kept: Tensor) -> float:
    """A bound below q(V), summed over rows, for every V in the pattern; `split` [m n] must be proven below H.

        q(V0) + sum_ij (K V0 + 1/2 B V0^2)_ij - (the `kept` largest (K + B V0)^2 / 2 B of each line)

    A bound on the rounding of all that (float64) is subtracted.
    """
    residual = q.residual(weight)
    values = q.values(weight, residual)
    leaving = residual * weight + split * weight.square() / 2
    saving = torch.where(split > 0, (residual + split * weight).square() / (2 * split), inf)
    saving = torch.where((split == 0) & (residual == 0), 0.0, saving)
    largest = lines(saving).sort(dim=1, descending=True).values.cumsum(1)
    count = kept.long()
    taken = torch.where(count > 0, largest.gather(1, (count - 1).clamp_min(0)), 0.0)
    unit = 4 * (q.shape[1] + 4) * torch.finfo(weight.dtype).eps
    moved = q.displacement(weight).abs()
    doubt = q.cross.abs() + moved @ q.gram.abs()  # over which the residual may be wrong by `unit`
    reach = weight.abs() + residual.abs() / split.clamp_min(torch.finfo(weight.dtype).tiny) + moved
    wrong = unit * float((doubt * reach).sum() + q.energy.sum() + values.sum() + leaving.abs().sum() + taken.sum())
    bound = float(values.sum() + leaving.sum() - taken.sum()) - wrong
    return bound if bound > 0 else 0.0  # also where it is not a number: the error is a sum of squares


def rounding(gram: Tensor) -> float:
    """What a Cholesky factorisation of H may be wrong by, as a multiple of the identity (Higham 2002, theorem 10.3)."""
    n = len(gram)
    return n * (n + 2) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max())


def _is_below(gram: Tensor, split: Tensor) -> bool:
    return int(torch.linalg.cholesky_ex(gram - (split + rounding(gram)).diag())[1]) == 0


def _share(target: Tensor, metric: Tensor, split: Tensor, price: Tensor) -> Tensor:
    """z in [0, 1] of each entry of the lines when a non-zero costs exp(price) [lines 1]."""
    slope = (2 * price.exp() * split).sqrt()
    return ((target * metric - slope).clamp_min(0) * split / (slope * metric)).clamp_max(1)


def _price(target: Tensor, metric: Tensor, split: Tensor, kept: Tensor, price: Tensor | None) -> Tensor:
    """The logarithm of the least price at which the shares of a line sum to at most `kept` [lines 1]."""
    if price is None:
        top = (target * metric).square() / (2 * split)  # at this price an entry leaves
        high = top.amax(1, keepdim=True).clamp_min(1e-300).log()
        low, count = high - 60, BISECTIONS[0]
    else:
        low, high, count = price - WINDOW, price + WINDOW, BISECTIONS[1]
    for _ in range(count):
        middle = (low + high) / 2
        many = _share(target, metric, split, middle).sum(1, keepdim=True) > kept
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return high
