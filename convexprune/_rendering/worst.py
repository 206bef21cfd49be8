"""The operators with the largest errors, and likely reasons."""

from statistics import median

from convexprune.report import OperatorReport, Report

from .grid import place

OVERFITTED = 2.0  # held-out error over calibration error from which the sample is named as the reason
HARD = 0.8  # of the error that no pruning avoids, from which that is named as the reason
MORE_ZEROS = 0.05  # than the whole model, from which the share is named as the reason
UNLIKE = 2.0  # times the median of operators of the same name, from which the layer is named as the reason


def worst(report: Report, count: int) -> list[OperatorReport]:
    return sorted(report.operators, key=_judged, reverse=True)[:count]


def reason(o: OperatorReport, report: Report) -> str:
    """Return the likely reason of an operator's large error, the first that applies."""
    if o.status not in (None, "SOLVED"):
        return f"its last solve ended as {o.status}"
    if o.tokens < o.inputs:
        return f"only {o.tokens:,} calibration tokens for {o.inputs:,} inputs"
    if o.held_out_error is not None and o.held_out_error > OVERFITTED * o.relative_error:
        times = o.held_out_error / o.relative_error if o.relative_error else float("inf")
        return f"{times:.1f} times the error on held-out tokens: more calibration samples help"
    if o.sparsity > report.sparsity + MORE_ZEROS:
        return f"it has more zeros than the whole model: {100 * o.sparsity:.0f} %"
    if o.bound is not None and o.bound["ratio"] > HARD:
        return f"no pruning has less than {o.bound['ratio']:.2f} of this error"
    return _compared(o, report)


def _compared(o: OperatorReport, report: Report) -> str:
    name = place(o.name)[1]
    usual = median([_judged(other) for other in report.operators if place(other.name)[1] == name])
    last = name.rpartition(".")[2]
    if usual > 0 and _judged(o) > UNLIKE * usual:
        return f"its layer: {_judged(o) / usual:.1f} times the median of all {last}"
    return f"its place: {last} has such errors in most layers"


def _judged(o: OperatorReport) -> float:
    error = o.relative_error if o.held_out_error is None else o.held_out_error
    return float("inf") if error != error else error
