"""Verify: the answers of the production solvers against oracles, and the pruning against a bound nobody can beat."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from convexprune._device.machine import default_device
from convexprune._device.switches import pinned
from convexprune._layerwise.settings import TokenWeighting
from convexprune._layerwise.steps.measure import rows_to_bound
from convexprune._progress import OnProgress, begin
from convexprune._progress.shown import visible
from convexprune._schema.functions import VERIFY
from convexprune._schema.parameters import documented
from convexprune.adapters import HuggingFaceModel, matcher, miscounted, token_weights
from convexprune.constraints import parse_pattern
from convexprune.core._bound import LowerBound
from convexprune.errors import RecipeError, unknown
from convexprune.pruners._damped import damped
from convexprune.report import finite

from ._layer_problems import OperatorProblem, SolvedProblem, operator_problems, oracles, solve_blocks
from ._results import terminal_table
from ._source import ReportedError, altered, on_grids, open_source, reported_errors, require_same_shapes

WIDE = 1024  # above, a split for every row costs too much: rows share one
SOLVED = ("operator", "problem", "solver", "objective", "difference", "gap", "KKT", "s")
BOUNDED = ("operator", "rows", "damping", "error", "lower bound", "ratio", "undamped: error", "bound", "ratio", "s")
MEASURED = ("operator", "relative error", "in the report", "largest weight / dense")


@dataclass(frozen=True)
class BoundReport:
    """The error on a sample of an operator's rows, and a lower bound on the error of every pruning."""

    operator: str
    rows: int
    damping: float  # the strength of the pruner's damping
    error: float  # mean |V x* - target|^2 plus the damping: the pruner's objective
    lower: float  # the bound on `error`
    ratio: float
    plain_error: float  # without damping, on the calibration tokens alone
    plain_lower: float
    plain_ratio: float
    seconds: float  # of both bounds

    def cells(self) -> list[str]:
        damped, plain = (self.error, self.lower, self.ratio), (self.plain_error, self.plain_lower, self.plain_ratio)
        figures = [text for e, low, ratio in (damped, plain) for text in (f"{e:.2e}", f"{low:.2e}", f"{ratio:.3f}")]
        return [self.operator, str(self.rows), f"{self.damping:.3f}", *figures, f"{self.seconds:.1f}"]


@dataclass
class Verification:
    """All comparisons; `faults` names the missed tolerances.

    Args:
        source: the verified model or run.
        settings: settings of the recipe.
        tolerance: the largest accepted relative difference of objectives.
        gap: the largest accepted relative duality gap.
        comparisons: the solves.
        bounds: the bounds.
        miscounted: operators of a run with other zeros than reported.
        altered: tensors that a run leaves alone, with other values than in the dense model.
        errors: reported errors of a run beside measured errors.
        note: what was not compared, and why.
        seconds: total time.
    """

    source: str
    settings: dict[str, Any]
    tolerance: float
    gap: float
    comparisons: list[SolvedProblem] = field(default_factory=list)
    bounds: list[BoundReport] = field(default_factory=list)
    miscounted: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    errors: list[ReportedError] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Missed tolerances; empty if all is well."""
        found = [
            f"{c.operator} [{c.penalty}] {x}" for c in self.comparisons for x in c.faults(self.tolerance, self.gap)
        ]
        found += [
            f"{b.operator}: the error {b.error:.3e} is below the bound {b.lower:.3e}, which no weight can be"
            for b in self.bounds
            if not (b.lower <= b.error * (1 + self.tolerance) and b.plain_lower <= b.plain_error * (1 + self.tolerance))
        ]
        found += [f"{name}: it is not the dense model's, and no run changes it" for name in self.altered[:1]]
        found += [*self.miscounted, *(e.fault for e in self.errors if e.fault)]
        return found if self.comparisons else [*found, "nothing was compared"]

    @property
    def passed(self) -> bool:
        """True if every tolerance was met."""
        return not self.faults

    @property
    def median_ratio(self) -> float:
        """The median over the operators of bound / error."""
        return _median(b.ratio for b in self.bounds)

    @property
    def median_plain_ratio(self) -> float:
        """Median ratio of bound and error without damping."""
        return _median(b.plain_ratio for b in self.bounds)

    def to_json(self) -> str:
        """Return the verification as JSON. Numbers that are not finite become text."""
        whole = asdict(self) | {"faults": self.faults, "passed": self.passed, "median_ratio": self.median_ratio}
        whole["median_plain_ratio"] = self.median_plain_ratio
        return json.dumps(finite(whole), indent=2, allow_nan=False)

    def tables(self) -> Iterator[Table]:
        """Yield tables: a line for a solve, and a line for a bound or an error."""
        solves = [line for problem in self.comparisons for line in problem.lines()]
        yield terminal_table("The same problem, several solvers", SOLVED, solves, names=2)
        if self.bounds:
            title, lines = "Squared error achieved, and what no pruning can beat", [b.cells() for b in self.bounds]
            yield terminal_table(title, BOUNDED, lines, names=1)
        if self.errors:
            lines = [e.cells() for e in self.errors]
            yield terminal_table("Errors of the run, measured again", MEASURED, lines, names=1)

    def verdict(self) -> Iterator[str | Text]:
        """Yield what could not be compared, the missed tolerances, and the result."""
        if self.note:
            yield self.note
        yield from (Text.assemble(("missed", "bold red"), f": {fault}") for fault in self.faults)
        verdict = ("passed", "bold green") if self.passed else ("failed", "bold red")
        figures = f"{len(self.comparisons)} problems; "
        if self.bounds:  # whole columns have none
            figures += f"median bound / error {self.median_ratio:.2f}, undamped {self.median_plain_ratio:.2f}; "
        yield Text.assemble(verdict, f": {figures}{self.seconds:.0f} s")


@visible
@pinned()
@documented(VERIFY)
def verify(source: str | Path | None = None, *, on_progress: OnProgress | None = None, **settings: Any) -> Verification:
    """Solve layer problems of a real model by the production solvers and by oracles, and bound the pruning from below.

    Settings are those of a fresh model with the allocation "uniform": to judge a different allocation, prune, and
    verify the folder of the run. For a run only `model` and `dataset` may be given: their new places.

    Args:
        source: a model (folder or hub name), pruned in memory by the settings; or the folder of a finished run, whose
            recipe names the dense model, the tokens and the pattern. The run's files are checked by the checksums in
            the report, its zeros and errors by the report's entries, all that it leaves alone by the dense model. None:
            the bundled model.
        on_progress: takes a `convexprune.Event` as a phase begins and as a step is done.
        settings: by name:
        {settings}

    Returns:
        All comparisons, and the missed tolerances.

    Raises:
        OutputError: a file of the run is missing or damaged, or the run is not finished.
        RecipeError: an unknown setting or operator, a number out of its range, or settings given for a finished run; or
            its model or data set is not at the recorded place.
        ModelError, CalibrationError: the model or the data set is not the run's.
        DependencyError: CVXPY is not installed.
    """
    began = time.perf_counter()
    asked, settings = VERIFY.read(settings)
    settings |= {} if asked.model is None else {"model": asked.model}
    oracles()  # before any work: CVXPY is an extra
    opened = open_source(source, settings, default_device(settings.pop("device", "auto")), asked.allow_changed)
    recipe, dense, pruned = opened.recipe, opened.dense, opened.pruned
    reports = [] if opened.report is None else opened.report.operators
    names = _choose(dense, asked.operators, asked.sample or None, asked.seed)
    result = Verification(str(source or "bundled model"), recipe.model_dump(mode="json"), asked.tolerance, asked.gap)
    if pruned is not None:
        require_same_shapes(dense, pruned, reports)
        wrong = miscounted(pruned, reports)
        names, result.miscounted = [name for name in names if name not in wrong], list(wrong.values())
        result.altered = altered(dense, pruned, recipe)
        if grids := on_grids(dense, recipe):
            result.note = f"Not compared with the dense model, as they are on grids: {', '.join(grids)}."
    tokens, same = opened.tokens()
    if pruned is not None and not same:
        told = "The model writes another text here than for the run: the report's errors are not compared."
        result.note = f"{result.note} {told}".strip()
    weights = token_weights(dense, TokenWeighting.parse(recipe.token_weights), tokens, recipe.batch_size)
    layer = recipe.layer_settings(patterns={o.name: parse_pattern(o.pattern) for o in reports})
    layer = replace(layer, token_weights=weights)
    generator = torch.Generator().manual_seed(asked.seed)

    def judge(operator: OperatorProblem) -> None:
        result.comparisons.extend(solve_blocks(operator, asked.rows, asked.columns, generator))
        if operator.pattern.budget(operator.dense.shape) is not None:
            result.bounds.append(bound(operator, asked.bound_rows, generator))
        if same:
            result.errors.extend(reported_errors(operator, reports))
        step(operator.name)

    step = begin("verifying", len(names))
    operator_problems(dense, tokens, layer, names, judge, pruned, recipe.batch_size, reports)
    result.seconds = time.perf_counter() - began
    return result


def bound(operator: OperatorProblem, rows: int | None, generator: torch.Generator) -> BoundReport:
    """Bound random rows of an operator, or all, with the pruner's damping and without; more rows for whole columns."""
    began = time.perf_counter()
    pattern = operator.pattern
    problem, achieved = operator.rows(None if rows is None else rows_to_bound(pattern, rows), generator)
    is_small = problem.weight.shape[1] <= WIDE and rows is not None and not pattern.by_column
    method = LowerBound(per_row=is_small)
    plain = method.of(problem.quadratic, problem.pattern, achieved)
    r = operator.damping
    posed = plain if r.strength == 0 else method.of(damped(problem, r), problem.pattern, achieved)
    figures = (x for b in (posed, plain) for x in (b.error, b.lower, b.ratio))
    return BoundReport(operator.name, plain.rows, r.strength, *figures, seconds=time.perf_counter() - began)


def _median(ratios: Iterable[float]) -> float:
    known = torch.tensor(list(ratios), dtype=torch.float64)
    return float(known.quantile(0.5)) if len(known) else nan


def _choose(model: HuggingFaceModel, operators: Sequence[str], sample: int | None, seed: int) -> list[str]:
    every = [f"{layer.name}.{operator.name}" for layer in model.layers for operator in layer.operators]
    if operators:
        matches = [matcher(asked) for asked in operators]
        for asked, is_asked in zip(operators, matches, strict=True):
            if not any(map(is_asked, every)):
                raise RecipeError(unknown("operator", asked, every))
        return [name for name in every if any(is_asked(name) for is_asked in matches)]
    if sample is None or sample >= len(every):
        return every
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:sample]
    return [every[i] for i in drawn.sort().values.tolist()]
