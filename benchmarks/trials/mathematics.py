"""What has to hold of certificates, statuses, baselines and units, each on a small problem."""

import re
from fractions import Fraction
from pathlib import Path

import torch
from rows import Checks
from torch import Tensor
from workshop import ran

from convexprune import (
    L1,
    Certificate,
    Moments,
    Problem,
    Quadratic,
    Solution,
    Status,
    Support,
    Unstructured,
    certify,
    make_solver,
)
from convexprune.errors import ConvexpruneError
from convexprune.pruners import PRUNERS, FISTAPruner, LayerProblem

rows = Checks("mathematics")
DOCS = Path(__file__).parents[2] / "docs"


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normal numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def correlated(seed: int, tokens: int, inputs: int, memory: float = 0.9) -> Tensor:
    """Inputs [tokens inputs] whose neighbours are alike: an autoregression."""
    noise, columns = drawn(seed, tokens, inputs), []
    for column in noise.T:
        columns.append(column if not columns else memory * columns[-1] + (1 - memory**2) ** 0.5 * column)
    return torch.stack(columns, 1)


def consistent(problem: Problem, solution: Solution, tolerance: float) -> bool:
    """Whether SOLVED is what the certificate of the returned weight says."""
    gap = certify(problem, solution.weight).relative_gap
    return (solution.status is not Status.SOLVED) or (
        gap <= tolerance and solution.certificate.relative_gap <= tolerance
    )


# Dead inputs: pruned first, at no cost, by every method


@rows.row(
    "{}: with 20 % dead inputs no more than 1.15 times the error that it has without them.",
    each=[name for name in PRUNERS if name != "magnitude"],
)
def dead_inputs(name: str) -> None:
    """Error of a method where 20 % of the inputs are dead, over its error without them and with as many non-zeros."""
    x = 0.02 * correlated(0, 400, 40)
    alive = torch.ones(40, dtype=torch.bool)
    alive[::5] = False
    weight = drawn(1, 24, 40)
    errors = []
    for inputs, part, kept in ((x * alive, weight, 0.5), (x[:, alive], weight[:, alive], 0.5 * 40 / 32)):
        moments = Moments(part.shape[1], torch.float64)
        moments.add(inputs)
        problem = LayerProblem(part, moments, Unstructured(1 - kept), 0.0)
        errors.append(float(problem.squared_error(PRUNERS[name]().prune(problem).weight).sum()))
    assert errors[0] <= 1.15 * errors[1], f"{errors[0] / errors[1]:.2f} times the error"


@rows.row("{}: inputs or weights times 1000 or 1/1000 change no more than 5 % of what is kept.", each=PRUNERS)
def units(name: str) -> None:
    """The same weights are kept if inputs or weights are measured in other units."""
    x, weight = correlated(0, 300, 32) * (torch.arange(32) % 6 > 0), drawn(1, 16, 32)
    kept = []
    for unit, size in ((1, 1), (1e-3, 1), (1e3, 1), (1, 1e-3)):
        moments = Moments(32, torch.float64)
        moments.add(x * unit)
        pruned = PRUNERS[name]().prune(LayerProblem(weight * size, moments, Unstructured(0.5), 0.0))
        kept.append(pruned.weight != 0)
    moved = max(float((kept[0] != other).double().mean()) for other in kept[1:])
    assert moved <= 0.05, f"{moved:.0%} of the kept weights are others"


# Statuses and certificates


@rows.row("SOLVED means that the certificate of the returned weight meets the tolerance: 400 random problems.")
def solved_is_certified() -> None:
    lies = []
    for seed in range(400):
        problem, tolerance = random_problem(seed), 10.0 ** -(4 + seed % 3 * 2)
        solution = make_solver(("fista", "admm")[seed // 3 % 2], tolerance=tolerance, max_iterations=300).solve(problem)
        if not consistent(problem, solution, tolerance):
            lies.append(certify(problem, solution.weight).relative_gap / tolerance)
    assert not lies, f"{len(lies)} of 400 are SOLVED above their tolerance, up to {max(lies):.0e} times"


def random_problem(seed: int) -> Problem:
    """A small LASSO or refit: few or many tokens, wide or equal column scales, targets with and without noise."""
    tokens, n, m = 2 + seed % 17, 2 + seed % 7, 1 + seed % 3
    x = drawn(seed, tokens, n) * 10 ** (drawn(seed + 1, n) * (seed % 4))
    y = x @ drawn(seed + 2, n, m) * 10.0 ** (seed % 5 - 2)
    y += drawn(seed + 3, tokens, m) * (0.0, 1e-8, 0.1, 1.0)[seed % 4]
    quadratic = Quadratic.least_squares(x, y)
    if seed % 5 == 0:
        return Problem(quadratic, Support(drawn(seed + 4, m, n) > 0))
    return Problem(quadratic, L1(float(quadratic.cross.abs().max()) * 10.0 ** -(seed % 6)))


@rows.row("Column scales that spread over ten powers of ten: a perfect refit is certified.")
def wide_columns() -> None:
    x = drawn(0, 50, 8) * 10 ** torch.linspace(-5, 5, 8, dtype=torch.float64)
    problem = Problem(Quadratic.least_squares(x, drawn(1, 50, 3)), Support(drawn(2, 3, 8) > -0.5))
    solution = make_solver("cg", tolerance=1e-8).solve(problem)
    assert solution.status is Status.SOLVED, f"{solution.status.name}, gap {solution.certificate.relative_gap:.1e}"


@rows.row("Fewer tokens than inputs: a refit on a support of fewer weights than tokens is certified.")
def singular_support() -> None:
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, ::4] = True
    problem = Problem(Quadratic.least_squares(drawn(0, 8, 16), drawn(1, 8, 3)), Support(mask))
    solution = make_solver("cg", tolerance=1e-8).solve(problem)
    assert solution.status is Status.SOLVED, f"{solution.status.name}, gap {solution.certificate.relative_gap:.1e}"


@rows.row("The certified gap of a LASSO answer is of second order: no more than 10 times the true one.")
def tight_gap() -> None:
    quadratic = Quadratic.least_squares(correlated(0, 600, 60), drawn(1, 600, 4))
    problem = Problem(quadratic, L1(float(quadratic.cross.abs().max()) / 50))
    best = make_solver("fista", tolerance=1e-12, max_iterations=100_000).solve(problem).weight
    near = best * (1 + 1e-4 * drawn(2, 4, 60))
    certificate = certify(problem, near)
    truth = certificate.primal - problem.value(best)
    assert certificate.gap <= 10 * truth, f"{certificate.gap / truth:.0f} times the true gap"


@rows.row("No gap is below the truth, in exact arithmetic, beyond the rounding of the energy: 4,000 scalar problems.")
def no_false_gap() -> None:
    h, g, e, strength = exact_fits(4000)
    false = []
    for row in range(len(g)):
        quadratic = Quadratic(h[row : row + 1, None], g[row : row + 1, None], e[row : row + 1])
        weight = (g[row] / h[row]).reshape(1, 1)
        certificate = certify(Problem(quadratic, L1(float(strength[row]))), weight)
        hh, gg, ee, ss, v = (Fraction(float(t)) for t in (h[row], g[row], e[row], strength[row], weight[0, 0]))
        best = ee / 2 - max(abs(gg) - ss, Fraction(0)) ** 2 / (2 * hh)
        primal = hh * v * v / 2 - gg * v + ee / 2 + ss * abs(v)
        excess = (primal - best) - Fraction(certificate.gap) - 320 * Fraction(2.0**-52) * ee
        if excess > 0:
            false.append(float(excess / primal) if primal > 0 else 1.0)
    assert not false, f"{len(false)} false gaps, up to {max(false):.1e} of the primal"


def exact_fits(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scalar problems whose targets are a weight's own outputs, on one token."""
    x, weight = 10 ** (3 * drawn(0, count)), drawn(1, count) * 10 ** (2 * drawn(2, count))
    y = x * weight
    return x * x, x * y, y * y, (x * y).abs() * 10 ** (-6 + 2 * drawn(3, count))


@rows.row("float32, targets that are outputs of a weight but for 1e-6 of noise: SOLVED only if the tokens agree.")
def float32_noise() -> None:
    for noise in (1e-6, 1e-7, 1e-9):
        x = drawn(0, 200, 20)
        y = x @ drawn(1, 20, 4) + noise * drawn(2, 200, 4)
        single = Quadratic.least_squares(x.float(), y.float())
        mask = torch.ones(4, 20, dtype=torch.bool)
        mask[:, 0] = False
        for penalty in (L1(1e-9), Support(torch.ones(4, 20, dtype=torch.bool))):
            solver = "cg" if isinstance(penalty, Support) else "fista"
            solution = make_solver(solver).solve(Problem(single, penalty))
            exact = Problem(Quadratic.least_squares(x, y), penalty.to(torch.float64))
            truth = certify(exact, solution.weight.double())
            if solution.status is Status.SOLVED:
                assert truth.relative_gap <= 0.01, f"noise {noise}: SOLVED, and {truth.relative_gap:.1e} from optimal"


@rows.row("Inputs of 1e10 or 1e-18 without scaling, float32: SOLVED only with a gap that meets the tolerance.")
def lipschitz_overflow() -> None:
    for size in (1e10, 1e-12, 1e-15, 1e-18):
        x = drawn(0, 100, 6, dtype=torch.float32) * size
        quadratic = Quadratic.least_squares(x, x @ drawn(1, 6, 2, dtype=torch.float32))
        problem = Problem(quadratic, L1(float(quadratic.cross.abs().max()) * 0.1))
        solution = make_solver("fista", scale=False).solve(problem)
        gap = solution.certificate.relative_gap
        assert solution.status is not Status.SOLVED or gap <= 1e-4, f"inputs of {size}: SOLVED, gap {gap:.2f}"


@rows.row(
    "A row of small outputs is solved as well as SOLVED says, or the certificate's documentation says that it need not be."
)
def small_row() -> None:
    x = correlated(0, 100, 30)
    y = x @ drawn(1, 30, 2) * torch.tensor([1.0, 1e-4]) + drawn(2, 100, 2) * torch.tensor([1.0, 1e-4])
    quadratic = Quadratic.least_squares(x, y)
    strength = quadratic.cross.abs().amax(1, keepdim=True).expand(2, 30) / 20
    solution = make_solver("fista").solve(Problem(quadratic, L1(strength)))
    told = "rows" in str(Certificate.relative_gap.__doc__).lower()
    alone = Problem(Quadratic(quadratic.gram, quadratic.cross[1:], quadratic.energy[1:]), L1(strength[1:]))
    gap = certify(alone, solution.weight[1:]).relative_gap
    assert told or gap <= 1e-4, f"that row's gap is {gap:.1e}, and nothing says so"


@rows.row("An indefinite, asymmetric or inconsistent problem is refused, or has no finite gap: 100 random ones.")
def no_problem_at_all() -> None:
    wrong = []
    for seed in range(100):
        x = drawn(seed, 30, 5)
        quadratic = Quadratic.least_squares(x, drawn(seed + 1, 30, 2))
        h, g, e = quadratic.gram.clone(), quadratic.cross, quadratic.energy.clone()
        if seed % 3 == 0:
            h = h + h.triu(1)
        elif seed % 3 == 1:
            h -= 2 * torch.linalg.eigvalsh(h)[-1] * torch.outer(drawn(seed, 5), drawn(seed, 5))
        else:
            e *= 0.0
        try:
            problem = Problem(Quadratic(h, g, e), L1(0.1))
            answer = make_solver("fista", check_every=1).solve(problem)
        except ConvexpruneError:
            continue
        if answer.status is Status.SOLVED or certify(problem, torch.zeros_like(g)).relative_gap <= 1e-3:
            wrong.append(seed)
    assert not wrong, f"{len(wrong)} of 100 are SOLVED or certified"


@rows.row("A zero Gram matrix with a cross term has no least value: status and certificate say so alike.")
def zero_gram() -> None:
    try:
        problem = Problem(Quadratic(torch.zeros(3, 3), torch.ones(2, 3), torch.ones(2)), L1(0.1))
        answer = make_solver("fista").solve(problem)
    except ConvexpruneError:
        return
    assert answer.status is not Status.SOLVED, f"SOLVED, relative gap {answer.certificate.relative_gap:.2f}"


# Proxes and baselines


@rows.row("A prox with a negative step is refused: it would expand.")
def negative_step() -> None:
    try:
        moved = L1(0.1).prox(torch.ones(1, 2), -1.0)
    except ConvexpruneError:
        return
    assert bool((moved.abs() <= 1).all()), f"1 became {float(moved.max()):.2f}"


@rows.row("fistapruner's default ends where the paper's does: an improvement of 1e-3 or less.")
def fistapruner_default() -> None:
    improvement = FISTAPruner().improvement
    assert improvement <= 1e-3, f"improvement={improvement}"


@rows.row("`compare` runs Wanda as published, with its quota in each row, or its report says whose quota it has.", 300)
def wanda_as_published() -> None:
    ran("compare m/llama --methods wanda ... --eval-text t/ok.txt --eval-window 32 --eval-windows 2")
    report = Path("out/report.md").read_text()
    assert re.search(r"(?i)wanda.*\brow\b|\brow\b.*wanda|quota", report), "report.md does not say whose quota"


@rows.row("The pages say that nothing called LaPrune exists, and on which machines bits are the same.")
def docs_say() -> None:
    text = " ".join(path.read_text() for path in DOCS.glob("*.md"))
    assert re.search("LaPrune", text), "no line on LaPrune"
    runs = (DOCS / "runs.md").read_text()
    assert re.search("(?i)instruction set|kind of (CPU|device|machine)", runs), "runs.md does not say on which machines"
