"""Check that a Gram matrix, a cross term and energies can belong to a sum of squares: cheaply, and in full.

With H = X X', G = Z X', e_i = |z_i|^2, every [[H, G_i'], [G_i, e_i]] is positive semidefinite. The cheap check is on
entries, |H_jk| <= sqrt(H_jj H_kk) and |G_ij| <= sqrt(e_i H_jj); the full check needs a factorisation.
"""

import torch
from torch import Tensor

from convexprune.core._arrays import DTYPES, Array, as_tensor
from convexprune.core._symmetric import cholesky
from convexprune.errors import ProblemError

LOOSE = torch.finfo(torch.float32).eps ** 0.5  # also of float64: most moments were counted in float32


def fitting(gram: Array, cross: Array, energy: Array, anchor: Array | None) -> tuple[Tensor | None, ...]:
    """Return gram [n n], cross [m n], energy [m] and anchor [m n] as tensors of a common dtype and device."""
    target = as_tensor("cross", cross)
    if target.ndim != 2 or 0 in target.shape:
        raise ProblemError(f"`cross` is {list(target.shape)}; it must be [outputs inputs], one of each at least.")
    m, n = target.shape
    found = list[Tensor | None]()
    for name, given, shape in (
        ("gram", gram, [n, n]), ("cross", target, [m, n]), ("energy", energy, [m]), ("anchor", anchor, [m, n])
    ):  # fmt: skip
        tensor = None if given is None else as_tensor(name, given)
        found.append(tensor)
        if tensor is None:
            continue
        if list(tensor.shape) != shape or tensor.dtype not in DTYPES:
            raise ProblemError(
                f"`{name}` is {tensor.dtype} {list(tensor.shape)}; a quadratic of a weight {[m, n]} needs {shape}, "
                "floating point of 32 or 64 bits."
            )
        if tensor.dtype != target.dtype or tensor.device != target.device:
            raise ProblemError(
                f"`{name}` is {tensor.dtype} on {tensor.device}, `cross` {target.dtype} on {target.device}; all "
                "tensors of a quadratic have one dtype and one device."
            )
    return tuple(found)


def symmetric(gram: Tensor, cross: Tensor, energy: Tensor, anchor: Tensor | None) -> Tensor:
    """Return the symmetric part of H, if the entries of H, G and e can belong to a sum of squares.

    Differences of up to 3e-4, the root of float32's precision, count as rounding: of targets, in units of the anchor's
    outputs.
    """
    for name, tensor in {"gram": gram, "cross": cross, "energy": energy, "anchor": anchor}.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ProblemError(f"`{name}` holds a value that is NaN or infinite. Look at the data that it was made of.")
    gram = _symmetric_part(gram)
    size = gram.diagonal().sqrt()
    reach = ((1 + LOOSE) * energy.clamp_min(0)).sqrt()
    if anchor is not None:
        reach = reach + LOOSE * (anchor.abs() @ size)
    wrong = (energy < 0) | (cross.abs() > reach[:, None] * size).any(1)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0, 0])
        raise ProblemError(
            f"`energy` of output {i} is {float(energy[i]):.6g}, too small for its `cross`: |G_ij| <= sqrt(e_i H_jj). "
            "It is the sum of squares of the target, the constant of the quadratic, and cannot be left out; where an "
            "input is always zero, the cross term is zero."
        )
    return gram


def _symmetric_part(gram: Tensor) -> Tensor:
    """Return H, or (H + H') / 2 if H is symmetric only up to rounding; refuse entries of no Gram matrix."""
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        raise ProblemError(
            f"`gram` has {float(diagonal.min()):.3g} on its diagonal, where mean squares of inputs stand."
        )
    size = diagonal.sqrt()
    room = torch.outer(size, size)
    if not torch.equal(gram, gram.T):
        if bool(((gram - gram.T).abs() > LOOSE * room).any()):
            j, k = divmod(int((gram - gram.T).abs().argmax()), len(gram))
            raise ProblemError(
                f"`gram` is not symmetric: entry [{j} {k}] is {float(gram[j, k]):.6g}, entry [{k} {j}] is "
                f"{float(gram[k, j]):.6g}. A Gram matrix is X X'; (gram + gram.T) / 2 is its symmetric part."
            )
        gram = (gram + gram.T) / 2
    if bool((gram.abs() > (1 + LOOSE) * room).any()):
        raise ProblemError(
            "`gram` is not positive semidefinite, as X X' is: an entry is too large for |H_jk| <= sqrt(H_jj H_kk)."
        )
    return gram


def is_sum_of_squares(gram: Tensor, cross: Tensor, least: Tensor, room: float, factor: Tensor | None) -> bool:
    """Return True if H + `room` I is positive semidefinite and e_i >= G_i H^+ G_i' for every row, up to rounding.

    H has a diagonal near 1, or zero. The energies in `least` [m] have what rounding may hide of them.
    """

    def enough(lower: Tensor) -> bool:
        return bool((torch.linalg.solve_triangular(lower, cross.T, upper=False).square_().sum(0) <= least).all())

    if factor is not None and (not bool(cross.any()) or enough(factor)):
        return True
    raised = gram.clone()  # (H + r I)^-1 <= H^+ on the range of H, and next to infinite beyond
    raised.diagonal().add_(room)
    factor = cholesky(raised)
    return factor is not None and enough(factor)
