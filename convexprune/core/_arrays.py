"""The arrays that users bring, as tensors and second moments, and the form of what they get: arrays, text, HTML."""

from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexprune.errors import ProblemError

Array = Tensor | np.ndarray
DTYPES = (torch.float32, torch.float64)


def as_tensor(name: str, value: object) -> Tensor:
    """Return a tensor as it is, without gradients; an array, a data frame or nested lists of numbers as a tensor."""
    try:
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
            return value.detach() if value.requires_grad else value  # the same object tells a common Gram matrix
        if isinstance(value, Tensor | np.ma.MaskedArray):
            raise TypeError
        array = np.asarray(value)
        taken = array.flags.writeable and array.dtype.isnative and min(array.strides, default=0) >= 0
        # pandas lends its own, to be read alone
        return torch.as_tensor(array if taken else array.astype(array.dtype.newbyteorder("="), "C"))
    except (TypeError, ValueError, RuntimeError) as cause:
        raise ProblemError(
            f"`{name}` is of type {type(value).__name__}; needed is a tensor or an array of numbers: dense, in memory "
            "and without a mask."
        ) from cause


def require_type(value: object, kind: type) -> None:
    """Refuse a value of another type."""
    if not isinstance(value, kind):
        needed = f"{kind.__module__.split('.')[0]}.{kind.__name__}"
        raise ProblemError(f"A value of type {type(value).__name__} was given. Accepted: an object of {needed}.")


def as_floats(name: str, value: object) -> Tensor:
    """Return `as_tensor`, with whole numbers and booleans in float64."""
    tensor = as_tensor(name, value)
    if tensor.is_complex():
        raise ProblemError(
            f"`{name}` is {tensor.dtype}. Accepted: real numbers. If the imaginary part is zero, take `.real`."
        )
    return tensor if tensor.is_floating_point() else tensor.double()


@dataclass(frozen=True, eq=False)
class DataFormat:
    """The form in which a problem was stated, so that its answer has the same."""

    numpy: bool = False  # NumPy, SciPy or pandas, not torch
    flat: bool = False  # one response, without an axis for the rows
    means: tuple[Tensor, Tensor] | None = None  # of inputs [n] and targets [m] that were centred for an intercept

    @classmethod
    def of(cls, targets: object, means: tuple[Tensor, Tensor] | None = None) -> "DataFormat":
        if isinstance(targets, Tensor) and targets.ndim == 2 and means is None:
            return TENSORS
        return cls(not isinstance(targets, Tensor), np.ndim(targets) == 1, means)  # pyright: ignore[reportArgumentType]

    def weight(self, weight: Tensor) -> Any:
        """Return V [m n] in this form: [n] if it is flat."""
        return self._array(weight[0] if self.flat else weight)

    def intercept(self, weight: Tensor) -> Any:
        """Return mean y - V mean x of each row [m], a number if the form is flat; None without an intercept."""
        if self.means is None:
            return None
        inputs, targets = self.means
        offset = targets.double() - weight.double() @ inputs.double()
        return float(offset) if self.flat else self._array(offset.to(weight))

    def rows(self, chosen: slice | Tensor) -> "DataFormat":
        """The form of the rows `chosen` alone."""
        return self if self.means is None else replace(self, means=(self.means[0], self.means[1][chosen]))

    def repeated(self, times: int) -> "DataFormat":
        """The form of a sum of `times` weights."""
        return self if self.means is None else replace(self, means=(self.means[0].repeat(times), self.means[1]))

    def joined(self, other: "DataFormat | None") -> "DataFormat":
        """The form of a sum: the first, or the only one with means; without means where two have different ones."""
        if other is None or other.means is None:
            return self
        if self.means is None:
            return other
        same = all(torch.equal(*pair) for pair in zip(self.means, other.means, strict=True))
        return self if same else replace(self, means=None)

    def _array(self, tensor: Tensor) -> Any:
        return tensor.cpu().numpy() if self.numpy else tensor


TENSORS = DataFormat()


def second_moments(
    inputs: Any, targets: Any, anchor: Any, intercept: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, DataFormat]:
    """Return gram, cross, energy and anchor of the mean squared error, and the form of the data."""
    sparse = inputs.tocsr().astype(np.result_type(inputs.dtype, np.float32)) if hasattr(inputs, "tocsr") else None
    x = as_floats("inputs", inputs if sparse is None else sparse.data)
    y = as_floats("targets", targets)
    data = DataFormat.of(targets)
    y = y[:, None] if y.ndim == 1 else y
    shape = x.shape if sparse is None else sparse.shape
    if len(shape) != 2 or y.ndim != 2 or shape[0] != len(y) or not len(y):
        raise ProblemError(
            f"Inputs {list(shape)} and targets {list(y.shape)}; needed are [tokens inputs] and [tokens outputs] of one "
            "token or more."
        )
    if x.dtype not in DTYPES or x.dtype != y.dtype:
        raise ProblemError(f"Inputs are {x.dtype}, targets {y.dtype}; both must be float32, or both float64.")
    about = None
    if anchor is not None:
        about, needed = as_floats("anchor", anchor), (y.shape[1], shape[1])
        if about.numel() != y.shape[1] * shape[1]:
            raise ProblemError(f"`anchor` is {list(about.shape)}; needed is {list(needed)} [outputs inputs].")
        about = about.reshape(needed).to(y)
        y = y - (x @ about.T if sparse is None else torch.from_numpy(sparse @ about.numpy().T))
    middle = y.mean(0) if intercept else torch.zeros_like(y[0])
    y = y - middle
    if sparse is None:
        mean = x.mean(0) if intercept else torch.zeros_like(x[0])
        x = x - mean if intercept else x
        gram, cross = _square(x).div_(len(y)), (y.T @ x).div_(len(y))
    else:
        gram, cross, mean = (tensor.to(y) for tensor in _of_sparse(sparse, y.double(), intercept))
    energy = y.square().sum(0) / len(y)
    if not bool(gram.diagonal().isfinite().all() & energy.isfinite().all()):
        finite = all(bool(as_floats("", each).isfinite().all()) for each in (x, targets, anchor) if each is not None)
        bad = "whose square is too large for their dtype" if finite else "that is NaN or infinite"
        raise ProblemError(
            f"Inputs{', targets or the anchor' if anchor is not None else ' or targets'} hold a value {bad}."
        )
    if intercept:
        middle = middle if about is None else middle + about @ mean
        data = DataFormat(data.numpy, data.flat, (mean, middle))
    return gram, cross, energy, about, data


def _of_sparse(inputs: Any, y: Tensor, intercept: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return gram, cross and mean of sparse inputs, which stay so, and of centred targets, in float64.

    Columns more than half full are centred. Of others the mean square is at most twice the variance: nothing cancels.
    """
    from scipy.sparse import csr_array

    x, tokens = csr_array(inputs, dtype=np.float64), len(y)
    mean = torch.from_numpy(x.mean(0)) * intercept
    centre = mean * torch.from_numpy(np.bincount(x.indices, minlength=len(mean)) > tokens / 2)
    x = x - csr_array(np.ones((tokens, 1))) @ csr_array(centre[None].numpy())
    rest = torch.from_numpy(x.mean(0)) * intercept  # what rounding left of the mean, too
    gram = torch.from_numpy((x.T @ x).toarray()) / tokens - torch.outer(rest, rest)
    cross = torch.from_numpy((x.T @ y.numpy()).T) / tokens - torch.outer(y.mean(0), rest)
    return (gram + gram.T) / 2, cross.contiguous(), mean


def _square(x: Tensor) -> Tensor:
    """Return X' X [n n]: NumPy computes a triangle alone."""
    if x.device.type == "cpu":
        with np.errstate(all="ignore"):
            return torch.from_numpy(x.numpy().T @ x.numpy())
    gram = x.T @ x
    return (gram + gram.T) / 2


class Shown:
    """A result that prints its facts, as text and as HTML."""

    def facts(self) -> dict[str, str]:
        """Return the name and the text of each fact."""
        raise NotImplementedError

    def __str__(self) -> str:
        facts = self.facts()
        width = max(map(len, facts))
        return "\n".join(f"{name:{width}}  {text}" for name, text in facts.items())

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in self.facts().items())
        return f"<table>{''.join(rows)}</table>"
