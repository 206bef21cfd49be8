"""Compare the report of a run with the files of the run's folder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isclose, isnan

import torch

from convexprune.adapters import HuggingFaceModel
from convexprune.errors import ModelError
from convexprune.report import OperatorReport

from ._layer_problems import OperatorProblem

SAME = 0.05  # relative: another machine may round the hidden states otherwise
NOTHING = 1e-9  # an error that is only rounding


@dataclass(frozen=True)
class ReportedError:
    """The relative error of an operator, reported and measured again on the same tokens."""

    operator: str
    error: float
    reported: float
    held_out: float | None  # the report's
    growth: float  # largest absolute weight over the dense operator's

    @property
    def fault(self) -> str:
        """Return the disagreement in words; empty if the errors agree."""
        return (
            ""
            if self.agrees
            else f"{self.operator}: its error is {self.error:.3e}, not {self.reported:.3e} as reported"
        )

    @property
    def agrees(self) -> bool:
        """Return True if the errors are as near as on two machines. Operators without input have NaN."""
        both = isnan(self.error) and isnan(self.reported)
        return both or isclose(self.error, self.reported, rel_tol=SAME, abs_tol=NOTHING)


def reported_errors(operator: OperatorProblem, reports: Iterable[OperatorReport]) -> list[ReportedError]:
    """Measure an operator's error with its tokens' weights, beside the reported error, unless tokens were borrowed."""
    problem, achieved = operator.rows(None, torch.Generator())
    error = float(problem.squared_error(achieved).sum() / problem.energy.sum())
    own = [o for o in reports if o.name == operator.name and "borrowed_tokens" not in o.facts]
    growth = float(achieved.abs().max() / problem.weight.abs().max())
    said = ((o, o.relative_error if o.weighted_error is None else o.weighted_error) for o in own)
    return [ReportedError(o.name, error, reported, o.held_out_error, growth) for o, reported in said]


def require_same_shapes(dense: HuggingFaceModel, pruned: HuggingFaceModel, reports: Sequence[OperatorReport]) -> None:
    """Check that two models and the report of a run have the same operators."""
    shapes = [{f"{y.name}.{o.name}": o.shape for y in m.layers for o in y.operators} for m in (dense, pruned)]
    shapes.append({report.name: (report.outputs, report.inputs) for report in reports})
    for name in dict.fromkeys(name for each in shapes for name in each):
        here, there, said = (each.get(name) for each in shapes)
        if not here == there == said:
            raise ModelError(
                f"{name} is {here} in the dense model, {there} in the run and {said} in its report: not of one model."
            )
