"""The second moments of a regression: of dense or sparse inputs, centred for an intercept or not."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexprune.core._arrays import DataFormat, as_floats, as_tensor
from convexprune.core._consistency import DTYPES
from convexprune.errors import ProblemError


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
    if not bool(x.isfinite().all() & y.isfinite().all()):
        raise ProblemError("Inputs or targets hold a value that is NaN or infinite.")
    about = None
    if anchor is not None:
        about = as_tensor("anchor", anchor).reshape(y.shape[1], shape[1]).to(y)
        y = y - (x @ about.T if sparse is None else torch.from_numpy(sparse @ about.numpy().T))
    middle = y.mean(0) if intercept else torch.zeros_like(y[0])
    y = y - middle
    if sparse is None:
        mean = x.mean(0) if intercept else torch.zeros_like(x[0])
        x = x - mean if intercept else x
        gram, cross = x.T @ x / len(y), y.T @ x / len(y)
    else:  # sparse inputs stay so: y is centred already
        mean = torch.from_numpy(np.asarray(sparse.mean(0)).ravel()).to(y) * intercept
        gram = torch.from_numpy((sparse.T @ sparse).toarray()) / len(y) - torch.outer(mean, mean)
        cross = torch.from_numpy(np.ascontiguousarray((sparse.T @ y.numpy()).T)) / len(y)
    if intercept:
        middle = middle if about is None else middle + about @ mean
        data = DataFormat(data.numpy, data.flat, (mean, middle))
    return (gram + gram.T) / 2, cross, y.square().sum(0) / len(y), about, data
