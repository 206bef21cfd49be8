"""The layer problems of a model, in float64, and the production solvers beside oracles on blocks of the problems."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune._layerwise.capture import split_last_branch, stage_inputs
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractModel, DecoderLayer, Group
from convexprune._layerwise.pipeline import Pipeline
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.stages import CorrectionTargets, height, weighted_parts, width
from convexprune._layerwise.steps.measure import drawn_rows
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._layerwise.work import stack_steps
from convexprune.constraints import Constraint
from convexprune.core import L1, Moments, Problem, Quadratic, Support
from convexprune.pruners import Damping, LayerProblem
from convexprune.report import OnOperator, OperatorReport
from convexprune.solvers import AbstractSolver, make_solver


@dataclass(frozen=True, eq=False)
class OperatorProblem:
    name: str
    dense: Tensor  # [m n]
    pruned: Tensor  # [m n]
    moments: Moments
    pattern: Constraint
    correction: float  # share of earlier errors to correct
    damping: Damping

    def rows(self, count: int | None, generator: torch.Generator) -> tuple[LayerProblem, Tensor]:
        """Return the pruning problem of `count` random rows, or of all, and their pruned weight."""
        chosen = drawn_rows(len(self.dense), count, generator)
        dense = self.dense[chosen].double()
        moments = self.moments.rows(chosen)
        return LayerProblem(dense, moments, self.pattern, self.correction), self.pruned[chosen].double()


@torch.no_grad()
def operator_problems(
    model: AbstractModel,
    tokens: Tensor,
    settings: LayerSettings,
    names: Collection[str],
    on_problem: Callable[[OperatorProblem], None],
    pruned: AbstractModel | None = None,
    batch_size: int = 1,
    reports: Iterable[OperatorReport] = (),
) -> None:
    """Visit the problems of selected operators of a dense model, in order of execution.

    x is the input of an operator in the dense layer, x* in the pruned layer; without a `pruned` model a copy of each
    layer is pruned here. With a dense prefix only layers with a selected operator are pruned. Problems of a single
    decoder layer are in memory at a time. The model is not changed. An expert without tokens is left out.
    """
    damping = {report.name: report.damping for report in reports}

    def on_operator(report: OperatorReport) -> None:
        damping[report.name] = report.damping

    def step(context: LayerContext) -> None:
        layer, sparse = context.layer, context.layer
        wanted = {f"{layer.name}.{operator.name}" for operator in layer.operators}.intersection(names)
        if wanted or settings.prefix == "pruned":
            sparse = pruned.layers[context.number] if pruned else _pruned(context, settings, on_operator)
        for problem in _watch(context, sparse, wanted, settings, damping):
            on_problem(problem)
        if settings.prefix == "pruned":
            context.hand_on(
                [context.calls(batch)(sparse.module, batch) for batch in context.inputs["pruned"]], "pruned"
            )
        context.hand_on(context.outputs())

    needed = [i for i, layer in enumerate(model.layers) if any(name.startswith(f"{layer.name}.") for name in names)]
    states = MemoryStore(range(max(needed, default=-1) + 1))
    LayerWalk(model, tokens.split(batch_size), states, settings.streams).run(step)


def _pruned(context: LayerContext, settings: LayerSettings, on_operator: OnOperator) -> DecoderLayer:
    copied = replace(context, layer=deepcopy(context.layer))
    copied.observe((settings.error_target,))
    Pipeline(settings, stack_steps(settings, on_operator))(copied)
    return copied.layer


def _watch(
    context: LayerContext,
    sparse: DecoderLayer,
    wanted: Collection[str],
    settings: LayerSettings,
    damping: Mapping[str, Damping | None],
) -> Iterator[OperatorProblem]:
    dense, calls = context.layer, context.calls
    pairs = [
        (one, other)
        for one, other in zip(dense.groups, sparse.groups, strict=True)
        if any(f"{dense.name}.{operator.name}" in wanted for operator in one.operators)
    ]
    if not pairs:
        return
    observed = context.observe((settings.error_target,))
    same = dense.stages[0] if settings.prefix == "dense" else ()
    lacking = CorrectionTargets([one for one, _ in pairs if one not in same], dense, observed, settings)
    totals = {one: list(_totals(dense.name, one, lacking.in_output_space(one), settings)) for one, _ in pairs}
    first = 0
    for i, given in enumerate(context.inputs[settings.prefix]):
        seen = stage_inputs(sparse, [other for _, other in pairs], calls(given), given)
        for one, other in pairs:
            if other not in seen:
                continue
            output = None
            if lacking.is_last_branch([one]):
                pruned = split_last_branch(sparse, other, calls(given), given)
                output = pruned._replace(branch=one.input_hook.module(seen[other])).output
            x, d = lacking.of(one, i, seen[other], output)
            x = x.cpu()
            for _, rows, weights, total in totals[one]:
                own = None if weights is None else weights[first : first + len(x)]
                total.add(x, weights=own)
                if d is not None:
                    of_rows = d[..., rows] if lacking.in_output_space(one) else d
                    total.add_errors(x.flatten(0, -2), of_rows.flatten(0, -2).cpu(), own)
        first += len(given)
    for one, other in pairs:
        sparse_operators = {operator.name: operator for operator in other.operators}
        for part, _, _, total in totals[one]:
            rows_of_each = torch.arange(height(part)).split([w.shape[0] for w in part.operators])
            for w, rows in zip(part.operators, rows_of_each, strict=True):
                name = f"{dense.name}.{w.name}"
                if name in wanted and total.tokens:
                    weights = w.read().cpu(), sparse_operators[w.name].read().cpu()
                    asked = settings.pattern_of(name), settings.correction, damping.get(name) or Damping(0.0)
                    yield OperatorProblem(name, *weights, total.rows(rows), *asked)


def _totals(
    layer: str, group: Group, in_output_space: bool, settings: LayerSettings
) -> Iterator[tuple[Group, slice, Tensor | None, Moments]]:
    """Yield the parts of a group whose tokens have the same weights, with moments to fill."""
    for part, rows, weights in weighted_parts(layer, group, settings.token_weights):
        outputs = height(part) if in_output_space else None
        yield part, rows, weights, Moments(width(part), torch.float64, outputs=outputs)


EXACT = 1e-8  # the gap to which the production solver is run for the comparison
NEGLIGIBLE = 1e-9
"""Of the target's energy: an objective below this is an exact fit, of which rounding decides, and counts as this."""


@dataclass(frozen=True)
class Solve:
    """The answer of a solver to a problem; `difference` and `relative_gap` are relative to the objective.

    If the target is fitted all but exactly, as on fewer tokens than inputs, both are relative to `NEGLIGIBLE` of its
    energy.
    """

    solver: str
    objective: float  # q + p at the answer
    difference: float  # the objective less the least objective of all solvers
    relative_gap: float
    kkt_residual: float
    seconds: float


@dataclass(frozen=True)
class SolvedProblem:
    """A problem of an operator, and its answers: of production by default and to the end, and of oracles."""

    operator: str
    penalty: str  # "L1" or "support"
    rows: int
    columns: int
    solves: tuple[Solve, ...]

    def lines(self) -> Iterator[list[str]]:
        head = [self.operator, f"{self.penalty} {self.rows}x{self.columns}"]
        for s in self.solves:
            figures = (f"{x:.0e}" for x in (s.difference, s.relative_gap, s.kkt_residual))
            yield [*head, s.solver, f"{s.objective:.9e}", *figures, f"{s.seconds:.3f}"]
            head = ["", ""]

    def faults(self, tolerance: float, gap: float) -> Iterator[str]:
        """Yield missed tolerances; `gap` is the largest accepted gap of the production solver at its default.

        An oracle that ends early is a line of the table and no fault of the production solver, unless all oracles do.
        """
        _, exact, *oracles = self.solves
        if not exact.difference <= tolerance:
            yield f"{exact.solver}: the objective is {exact.difference:.1e} above the least"
        if not any(oracle.difference <= tolerance for oracle in oracles):
            least = min(oracles, key=lambda oracle: oracle.difference)
            yield f"no oracle confirms the least objective: {least.solver} is {least.difference:.1e} above"
        if not self.solves[0].relative_gap <= gap:
            yield f"{self.solves[0].solver}: the gap at default settings is {self.solves[0].relative_gap:.1e}"


def block(problem: LayerProblem, columns: int, generator: torch.Generator) -> tuple[Quadratic, torch.Tensor]:
    """Return a pruning problem in which only some columns, or groups of an n:m pattern, move, and the rest is dense."""
    n = problem.weight.shape[1]
    width = problem.pattern.block
    groups = torch.randperm(n // width, generator=generator)[: max(1, columns // width)].sort().values
    chosen = (groups[:, None] * width + torch.arange(width)).flatten()
    q = problem.quadratic.double
    assert q.anchor is not None
    return q.columns(chosen), chosen


def block_problems(q: Quadratic, problem: LayerProblem, kept: torch.Tensor) -> dict[str, Problem]:
    """Return the convex problems of a block without damping: reweighted L1 as of `convex`, the refit on a support."""
    assert q.anchor is not None
    scale = q.scale()
    scores = q.anchor.abs() * scale
    threshold = problem.pattern.threshold(scores).clamp_min(torch.finfo(scores.dtype).tiny)
    strength = threshold * torch.exp(-(scores / threshold).square()) * scale
    return {"L1": Problem(q, L1(strength)), "support": Problem(q, Support(kept))}


def production(penalty: str) -> dict[str, AbstractSolver]:
    """Return the production solver of a penalty, "L1" or "support", at its default and run to the end."""
    if penalty == "L1":
        return {"fista": make_solver("fista"), "fista, 1e-8": make_solver("fista", tolerance=EXACT,
                                                                          max_iterations=20_000)}  # fmt: skip
    return {"cg": make_solver("cg"), "cg, 1e-8": make_solver("cg", tolerance=EXACT, max_iterations=1000)}


def oracles() -> dict[str, AbstractSolver]:
    return {
        "cvxpy, Clarabel": make_solver("cvxpy", engine="CLARABEL"),
        "cvxpy, OSQP": make_solver("cvxpy", engine="OSQP"),
        "scipy": make_solver("scipy"),
    }


def solve_by_all(name: str, penalty: str, problem: Problem) -> SolvedProblem:
    solutions = {key: solver.solve(problem) for key, solver in (production(penalty) | oracles()).items()}
    values = {key: solution.certificate.primal for key, solution in solutions.items()}
    least, energy = min(values.values()), problem.quadratic.target_energy
    exact = max(NEGLIGIBLE * energy, torch.finfo(torch.float64).tiny)
    solves = tuple(
        Solve(
            key,
            values[key],
            (values[key] - least) / max(least, exact),
            solution.certificate.gap / max(values[key], exact),
            solution.certificate.kkt_residual,
            solution.solve_seconds,
        )
        for key, solution in solutions.items()
    )
    return SolvedProblem(name, penalty, *problem.shape, solves)


def solve_blocks(operator: OperatorProblem, rows: int, columns: int, generator: torch.Generator) -> list[SolvedProblem]:
    problem, achieved = operator.rows(rows, generator)
    quadratic, chosen = block(problem, columns, generator)
    problems = block_problems(quadratic, problem, achieved[:, chosen] != 0)
    return [solve_by_all(operator.name, penalty, p) for penalty, p in problems.items()]
