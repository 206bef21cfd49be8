"""An orthogonal matrix that turns vectors so that N:M patterns remove less of the operators around them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.constraints import Constraint

STEPS, RATE = 600, 0.32  # the length of a step at first, in radians by which it turns a coordinate
BLOCKS = 8  # of a step


@dataclass(frozen=True)
class Readers:
    """Rows [r n] of operators that read the vectors, and the inverse of the vectors' damped Gram matrix [n n]."""

    weight: Tensor
    inverse: Tensor

    def scores(self, rotation: Tensor) -> Tensor:
        """Return the error of removing an entry alone, with all others of its row refitted (OBS): w^2 / (H^-1)_jj."""
        return (self.weight @ rotation).square() / ((self.inverse @ rotation) * rotation).sum(0)


@dataclass(frozen=True)
class Writers:
    """Columns [n c] of operators that make the vectors, over the roots of (H^-1)_jj."""

    weight: Tensor

    def scores(self, rotation: Tensor) -> Tensor:
        return (rotation.T @ self.weight).square()


Blocks = Sequence[Readers | Writers]


def removed(blocks: Blocks, rotation: Tensor, pattern: Constraint) -> Tensor:
    """Return the mean over blocks of the scores that the pattern removes."""
    scores = [block.scores(rotation) for block in blocks]
    return torch.stack([each.masked_fill(pattern.mask(each.detach()), 0).sum() for each in scores]).mean()


def rotation(
    blocks: Blocks, pattern: Constraint, keeps_ones: bool, steps: int = STEPS, rate: float = RATE, seed: int = 0
) -> Tensor:
    """Return an orthogonal Q [n n], for vectors x Q, with few scores on removed entries.

    Steps of Adam in the tangent space, each on some blocks, followed by a Cayley transform. No step is exact, so the
    result need not be better than the identity. With `keeps_ones` Q maps the vector of ones to itself.
    """
    size = len(blocks[0].weight) if isinstance(blocks[0], Writers) else blocks[0].weight.shape[1]
    unit = torch.eye(size, dtype=blocks[0].weight.dtype, device=blocks[0].weight.device)
    projection = unit - 1 / size if keeps_ones else unit
    result, mean, square = unit, torch.zeros_like(unit), torch.zeros_like(unit[0, 0])
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        some = [blocks[i] for i in torch.randperm(len(blocks), generator=generator)[:BLOCKS].tolist()]
        slope = result.T @ _slope(lambda rotation, some=some: removed(some, rotation, pattern), result)
        tangent = projection @ (slope - slope.T) @ projection
        mean = mean + 0.1 * (tangent - mean)
        square = square + 0.01 * (tangent.square().mean() - square)
        length = rate / size**0.5 * (1 - (step - 1) / steps)
        root = (square / (1 - 0.99**step)).sqrt().clamp_min(torch.finfo(unit.dtype).tiny)
        half = length / 2 * mean / (1 - 0.9**step) / root
        result = result @ torch.linalg.solve(unit + half, unit - half)
    return _orthogonal(result)


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        return torch.autograd.grad(function(point), point)[0]


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest orthogonal matrix by Newton's iteration, which keeps the image of the vector of ones."""
    near = matrix.double()
    for _ in range(3):
        near = 1.5 * near - 0.5 * near @ near.T @ near
    return near.to(matrix)
