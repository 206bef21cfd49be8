"""Passes over the columns: a sweep that pushes errors on, a beam of sweeps, and an exchange of codes in turn."""

import torch
from torch import Tensor

from convexprune._device.precision import bare_product
from convexprune.constraints import OnGrid, divisible
from convexprune.core import definite_factor, upper_factor

SWEPT, EXCHANGED = 128, 256  # columns between two products
ONE_BY_ONE = 16  # columns of these between which a move is seen at once
FEW = 0.03  # of the entries of a product: a sparse one is faster on a CPU
ROOM = 2**24  # entries of a beam, of some rows at a time


def minimizer(cross: Tensor, gram: Tensor, anchor: Tensor) -> Tensor:
    """Return A + G H^-1 [m n], the weight of least error without zeros or grid."""
    return anchor + torch.cholesky_solve(cross.T, definite_factor(gram)).T


class Sweep:
    """GPTQ's sweep (Frantar et al., arXiv 2210.17323), by falling H_jj, on grids whose scales are known.

    With U the upper Cholesky factor of H^-1, a column's error (W_j - V_j) / U_jj is subtracted along U_j from the
    columns after it: the best that these can do, as long as they are free. So an error e of column j costs
    e^2 / U_jj^2.
    """

    def __init__(self, gram: Tensor) -> None:
        self._order = order = gram.diagonal().argsort(descending=True)
        self._upper = upper_factor(gram[order][:, order])

    @property
    def shape(self) -> Tensor:
        """Return U_jj [n]: errors of columns that cost the same."""
        return torch.empty_like(self._upper[0]).index_copy_(0, self._order, self._upper.diagonal())

    def onto(self, weight: Tensor, grid: OnGrid, mask: Tensor, cross: Tensor | None = None) -> OnGrid:
        """Return the weight [m n], the minimizer of the error, on the grid after a sweep over all columns.

        Entries outside the mask become zero, and their error is pushed on like that of rounding. With C = `cross` [n
        n], alpha * mean (x - x*) x*', and P = triu(C U', 1) U: once column j is rounded, W_j P_j: is added to the
        columns after it, so that they make up for what column j lacks (GPTAQ). Blocks further on get V_j P_j:, as in
        the authors' code.
        """
        # Columns are rows of what is transposed, so that they lie together in memory.
        order, columns = self._order, weight.shape[1]
        step, offset = grid.scales.spread(columns)
        scales, kept = step.T[order], mask.T[order]
        offsets = torch.zeros_like(scales[:, :1]) if offset is None else offset.T[order]
        divisors, left, upper = divisible(scales), weight.T[order], self._upper
        pulls = None
        if cross is not None:
            pulls = bare_product(bare_product(cross[order][:, order], upper.T).triu_(1), upper)
        codes = torch.empty_like(left)
        for first in range(0, columns, SWEPT):
            last = min(first + SWEPT, columns)
            part, u = left[first:last], upper[first:last, first:last]
            errors = torch.empty_like(part)
            for j in range(last - first):
                wanted = part[j] + offsets[first + j]
                code = grid.grid.nearest(wanted / divisors[first + j]) * kept[first + j]
                errors[j] = (wanted - code * scales[first + j]) / u[j, j]
                if pulls is not None:
                    part[j + 1 :] += pulls[first + j, first + j + 1 : last, None] * part[j]
                part[j:] -= u[j, j:, None] * errors[j]
                codes[first + j] = code
            left[last:] -= bare_product(upper[first:last, last:].contiguous().T, errors)
            if pulls is not None:
                left[last:] += pulls[first:last, last:].T @ part  # rounded by now
        return OnGrid(grid.grid, grid.scales, torch.empty_like(codes).index_copy_(0, self._order, codes).T.contiguous())

    def beam(self, weight: Tensor, found: OnGrid, width: int) -> OnGrid:
        """Return the best of `width` sweeps of each row, with the scales that the codes have.

        The cost so far, sum_j e_j^2 / U_jj^2, is the error of a row whose other columns are free. Each of its best
        `width` beginnings goes on with the two codes around the next weight, and the best `width` of these stay.
        """
        rows = torch.arange(len(weight), device=weight.device).split(max(1, ROOM // (width * weight.shape[1])))
        codes = [self._beam(weight[some], found.rows(some), width) for some in rows]
        return OnGrid(found.grid, found.scales, torch.cat(codes))

    def _beam(self, weight: Tensor, found: OnGrid, width: int) -> Tensor:
        order, upper, (rows, columns) = self._order, self._upper, weight.shape
        step, offset = found.scales.spread(columns)
        scales = step.T[order]
        offsets = torch.zeros_like(scales[:, :1]) if offset is None else offset.T[order]
        divisors, codes = divisible(scales), scales.new_empty(columns, width, rows)
        parents = torch.empty_like(codes, dtype=torch.int64)
        cost = torch.full_like(codes[0], torch.inf)
        cost[0] = 0  # all begin alike
        each_row = torch.arange(rows, device=weight.device)
        alone = torch.arange(width, device=weight.device)[:, None].expand(width, rows)

        def going_on(beginnings: Tensor, chosen: Tensor) -> Tensor:
            return beginnings.index_select(0, (chosen * rows + each_row).flatten())

        def branch(left: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
            """Choose codes of the weights `left` [width rows, columns]; return errors, and the beginnings that stay."""
            nonlocal cost
            if last - first > ONE_BY_ONE:  # by halves, so that little is copied and products are large
                middle = (first + last) // 2
                errors, begin = branch(left[:, : middle - first], first, middle)
                rest = going_on(left[:, middle - first :], begin)
                rest -= bare_product(errors, upper[first:middle, middle:last].contiguous())
                more, since = branch(rest, middle, last)
                if last == columns:  # nothing is left to subtract errors from
                    return more, since
                return torch.cat([going_on(errors, since), more], dim=1), begin.gather(0, since)
            part, begin = left.T.reshape(-1, width, rows), alone
            errors = torch.zeros_like(left)
            for i, j in enumerate(range(first, last)):
                pushed = (errors[:, :i] @ upper[first:j, j]).view(width, rows)
                wanted = part[i].gather(0, begin) - pushed + offsets[j]
                both = torch.stack(found.grid.around(wanted / divisors[j]))
                off = (wanted - both * scales[j]) / upper[j, j]
                costs = cost + off.square()
                costs[1].masked_fill_(both[0] == both[1], torch.inf)
                cost, place = costs.flatten(0, 1).topk(width, dim=0, largest=False)
                parents[j] = parent = place % width
                codes[j] = both.flatten(0, 1).gather(0, place)
                errors, begin = going_on(errors, parent), begin.gather(0, parent)
                errors[:, i] = off.flatten(0, 1).gather(0, place).flatten()
            return errors, begin

        branch(weight[:, order].repeat(width, 1), 0, columns)
        end = cost.argmin(0, keepdim=True).expand(width, rows)
        for j in reversed(range(columns)):
            codes[j] = codes[j].gather(0, end)
            end = parents[j].gather(0, end)
        return torch.empty_like(codes[:, 0]).index_copy_(0, order, codes[:, 0]).T.contiguous()


def exchanged(gram: Tensor, found: OnGrid, residual: Tensor, mask: Tensor, price: float) -> tuple[OnGrid, Tensor]:
    """Pass over the columns once: each code becomes the best one while all others stay as they are.

    That is the nearest one to t_ij = (V_ij + K_ij / H_jj + offset) / step (QuantEase, arXiv 2309.01885), but for what
    codes cost (`Codebook.chooser`), at the `price` of a bit in units of q. The residual K [m n] there is overwritten.
    Columns are rows of what is transposed, so that they lie together in memory.
    """
    grid, scales = found.grid, found.scales.step.T.contiguous()
    divisors, width = divisible(scales), len(gram) // len(scales)
    copied = torch.contiguous_format  # one row is contiguous both ways: `contiguous` would not copy it
    codes, kept, diagonal = found.codes.T.clone(memory_format=copied), mask.T.contiguous(), gram.diagonal()
    choose = grid.chooser(found.codes, price)
    for first in range(0, len(gram), EXCHANGED):
        last = min(first + EXCHANGED, len(gram))
        ahead = residual[:, first:last].T.clone(memory_format=copied)
        steps = torch.empty_like(ahead)
        for begin in range(0, last - first, ONE_BY_ONE):
            end = min(begin + ONE_BY_ONE, last - first)
            for i, j in enumerate(range(first + begin, first + end), begin):
                scale, pull = scales[j // width], divisors[j // width] * diagonal[j]
                code = choose(codes[j] + ahead[i] / pull, pull * scale)
                code *= kept[j]
                steps[i] = (code - codes[j]) * scale
                codes[j] = code
                ahead[i:end].addr_(gram[j, j : first + end], steps[i], alpha=-1)
            ahead[end:].addmm_(gram[first + end : last, first + begin : first + end], steps[begin:end], alpha=-1)
        _subtract_product(residual, steps.T, gram[first:last])
    return OnGrid(grid, found.scales, codes.T.contiguous()), residual


def _subtract_product(residual: Tensor, steps: Tensor, gram: Tensor) -> None:
    """Subtract the product of `steps`, few of which are not zero once codes have settled."""
    if residual.device.type == "cpu" and int(steps.count_nonzero()) < FEW * steps.numel():
        steps = steps.to_sparse()
    residual.addmm_(steps, gram, alpha=-1)
