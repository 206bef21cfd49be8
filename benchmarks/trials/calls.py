"""The names that the Python calls of calls.tsv use, and `call`, which runs one."""

from collections.abc import Callable, Iterable
from itertools import count
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import classifier, llama, small_bert, small_t5
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertModel, LlamaModel
from workshop import words

import convexprune
from convexprune import (
    L1,
    AbstractPenalty,
    AbstractSolver,
    Certificate,
    Moments,
    Problem,
    Quadratic,
    SemiStructured,
    Solution,
    Status,
    Support,
    Unstructured,
    certify,
    make_solver,
    parse_pattern,
)
from convexprune.adapters import EMBEDDED

TOKENS = torch.randint(2, 4000, (6, 32), generator=torch.Generator().manual_seed(1))


def call(text: str) -> None:
    """Run Python statements with the names of this file."""
    exec(text, dict(globals()))


def prune(model: Any = None, **settings: Any) -> convexprune.PruneResult:
    """`convexprune.prune` of the tiny decoder, loaded, on four windows of 32 random tokens."""
    usual = {"dataset": TOKENS, "num_calibration_samples": 4, "max_seq_length": 32, "bound_rows": 0}
    return convexprune.prune(llama() if model is None else model, **(usual | settings))


def tokenizer() -> Any:
    """The bundled one."""
    return AutoTokenizer.from_pretrained(EMBEDDED)


def zeros(model: Any) -> float:
    """The share of zeros in the linear maps of the decoder layers."""
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def state(model: Any) -> dict[str, Tensor]:
    """A copy of all tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Own(AbstractSolver):
    """A user's solver that answers what a function says."""

    def __init__(self, answer: Callable[[Problem, Tensor | None], Any]) -> None:
        self.answer = answer

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        return (AbstractPenalty,)

    def solve(self, problem: Problem, start: Tensor | None = None) -> Any:
        return self.answer(problem, start)


def solver(weight: Callable[[Problem], Tensor], gap: float = 0.0) -> Own:
    """A solver that answers a weight, and claims that its gap is small."""
    return Own(lambda p, _: Solution(weight(p), Status.SOLVED, Certificate(1.0, gap, gap), 1, 1, 0.0))


def failing(after: int) -> Own:
    """FISTA that raises after so many solves."""
    number, fista = count(), make_solver("fista")

    def answer(problem: Problem, start: Tensor | None) -> Solution:
        if next(number) >= after:
            raise RuntimeError("boom")
        return fista.solve(problem, start)

    return Own(answer)


def error_of(run: Callable[[], object]) -> str:
    """What an error says, with its notes."""
    try:
        run()
    except Exception as error:
        return " ".join([str(error), *getattr(error, "__notes__", ())])
    return ""


def data(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gram, cross and energy of a regression: 100 tokens, 6 inputs, 2 outputs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 6, dtype=torch.float64, generator=draw)
    y = x @ torch.randn(6, 2, dtype=torch.float64, generator=draw)
    y += 0.5 * torch.randn(100, 2, dtype=torch.float64, generator=draw)
    return (x.T @ x / 100).to(dtype), (y.T @ x / 100).to(dtype), (y.square().sum(0) / 100).to(dtype)


H, G, E = data()


def solve(h: Any = H, g: Any = G, e: Any = E, penalty: Any = None, name: str = "fista", **settings: Any) -> Solution:
    """A solve of the LASSO with these tensors."""
    problem = Problem(Quadratic(h, g, e), L1(0.1) if penalty is None else penalty)
    return make_solver(name, **settings).solve(problem)


def plus(h: Tensor, i: int, j: int, change: float) -> Tensor:
    """A copy with one entry changed."""
    new = h.clone()
    new[i, j] += change
    return new


def unsolved(solution: Solution) -> None:
    """Neither the status nor the gap may say that the answer is good."""
    assert solution.status is not Status.SOLVED, f"SOLVED, gap {solution.certificate.relative_gap}"
    assert not solution.certificate.relative_gap <= 1e-2, f"relative gap {solution.certificate.relative_gap}"


def unbounded(certificate: Certificate) -> None:
    """No gap may be claimed where there is no least value."""
    assert certificate.gap == inf, f"gap {certificate.gap} of a problem without a least value"


__all__ = [
    "BertModel", "DataLoader", "Iterable", "LlamaModel", "Moments", "Path", "SemiStructured", "Support", "Unstructured",
    "certify", "classifier", "nan", "np", "parse_pattern", "small_bert", "small_t5", "words",
]  # fmt: skip
