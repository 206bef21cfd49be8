"""Random problems over all penalties, dtypes, scalings and defects: no claim of a solution is wrong.

A bound from any certificate is at most the objective of every weight that anyone knows. The number of a failing problem
makes the problem again: `make(number)`.
"""

from math import inf

import pytest
import torch
from strategies import random

from convexprune import (
    L1,
    MCP,
    SCAD,
    AbstractPenalty,
    Blocks,
    ElasticNet,
    GroupLasso,
    NuclearNorm,
    Problem,
    Quadratic,
    ReverseHuber,
    RowGroups,
    Status,
    Support,
    TotalVariation,
    certify,
    make_solver,
)
from convexprune.errors import ConvexpruneError, UnsupportedError

TOLERANCE = 1e-6
DEFECTS = ("none", "singular", "duplicated", "dead", "nearly singular", "exact fit")
ROUNDING = 1e-12  # of the energy: two objectives in float64


def penalties(a: float, h: float, m: int, n: int, seed: int) -> dict[str, AbstractPenalty]:
    """Return a penalty of each kind, where `a` is a slope and `h` a curvature that matter to the problem."""
    entries, size = random(seed, m, n).abs(), a / h
    return {
        "L1": L1(a), "entries": L1(a * entries), "closed": L1((a * entries).where(entries > 0.5, inf)),
        "free": L1((a * entries).where(entries > 0.5, 0.0)), "net": ElasticNet(a, h * entries),
        "signs": ElasticNet(a, lower=0.0), "box": ElasticNet(0.1 * a, lower=-size, upper=size * entries),
        "columns": GroupLasso(a * m**0.5), "pairs": GroupLasso(a * m**0.5, block=2 if n % 2 == 0 else 1),
        "groups": RowGroups(torch.arange(n) // 3, a), "sparse groups": RowGroups(torch.arange(n) % 2, a, l1=0.3 * a),
        "jumps": TotalVariation(a, l1=0.1 * a), "rank": NuclearNorm(a * min(m, n) ** 0.5),
        "two": Blocks(((L1(a), n), (NuclearNorm(a), n))),
        "huber": ReverseHuber(h * (entries + 0.1), a**2 / h * entries),
        "support": Support(entries > 0.5), "MCP": MCP(a), "SCAD": SCAD(a),
    }  # fmt: skip


def make(number: int) -> Problem:
    """Return the problem of that number."""
    draw = torch.Generator().manual_seed(number)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    m, n, tokens = pick(1, 1, 2, 5), pick(1, 2, 4, 8), pick(1, 3, 20, 40)
    defect, dtype = pick(*DEFECTS), pick(torch.float64, torch.float64, torch.float32)
    x, y = random(number, tokens, n), random(number + 1, tokens, m)
    if defect == "singular":
        x = random(number, tokens, max(1, n // 2)) @ random(number + 2, max(1, n // 2), n)
    elif defect == "duplicated":
        x[:, -1] = x[:, 0]
    elif defect == "dead":
        x[:, 0] = 0
    elif defect == "nearly singular":
        x[:, -1] = x[:, 0] + 1e-6 * x[:, -1]
    elif defect == "exact fit":
        y = x @ random(number + 3, n, m)
    x, y = x * pick(1e-12, 1e-6, 1.0, 1e6, 1e12), y * pick(1e-12, 1e-6, 1.0, 1e6, 1e12)
    if pick(False, False, True):
        x = x * torch.logspace(-3, 3, n, dtype=torch.float64)
    quadratic = Quadratic.least_squares(x.to(dtype), y.to(dtype), intercept=pick(False, True))
    slope = float(quadratic.cross.abs().max()) * pick(1e-4, 0.03, 0.3, 1.2) or 1.0
    curvature = float(quadratic.gram.diagonal().max()) or 1.0
    kinds = penalties(slope, curvature, m, n, number)
    kind = pick(*kinds)
    quadratic = quadratic.repeated(2) if kind == "two" else quadratic
    return Problem(quadratic, kinds[kind].to(dtype))


def faults(number: int) -> list[str]:
    """Try a problem's answers and certificates."""
    found, bounds, objectives = [], {}, {}
    try:
        problem = make(number)
        penalty = problem.penalty
        weights = {"zero": torch.zeros_like(problem.quadratic.cross)}
        for name in ("auto", "fista", "admm", "working-set", "sklearn", "cg"):
            solver = make_solver(name, tolerance=TOLERANCE, max_iterations=60 if name == "working-set" else 400)
            if not isinstance(penalty, solver.penalties):
                continue
            try:
                solution = solver.solve(problem)
            except UnsupportedError:  # of strengths, not of the penalty
                continue
            weights[name], status, gap = solution.weight, solution.status, solution.certificate.relative_gap
            if (status is Status.SOLVED) != (penalty.is_convex and gap <= TOLERANCE):
                found.append(f"{name}: {status} at a gap of {gap}")
            if (status is Status.STATIONARY and penalty.is_convex) or (
                status is Status.NON_FINITE and penalty.is_convex
            ):
                found.append(f"{name}: {status}")
        for name, weight in weights.items():
            for precise in (True, False):
                certificate = certify(problem, weight, precise)
                bounds[name, precise] = certificate.dual if penalty.is_convex else -inf
                if precise:
                    objectives[name] = certificate.primal
    except ConvexpruneError as error:
        return [f"refused: {error}"] if "float" not in str(error) else []
    room = ROUNDING * problem.quadratic.target_energy
    least = min(objectives.values())
    eps = torch.finfo(problem.quadratic.cross.dtype).eps
    for (name, precise), bound in bounds.items():
        if bound > least + room + (0 if precise else 100 * eps * problem.quadratic.target_energy):
            found.append(f"{name}: a bound {bound} above the objective {least}, precise={precise}")
    return found


@pytest.mark.parametrize("fifty", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 40))])
def test_no_claim_about_a_random_problem_is_wrong(fifty: int):
    found = {number: faults(number) for number in range(50 * fifty, 50 * fifty + 50)}
    assert not {number: each for number, each in found.items() if each}


@pytest.mark.parametrize("number", [394, 1239])
def test_a_certificate_in_units_far_from_one_holds_without_float64_coordinates(number: int):
    assert not faults(number)  # fused; weights are up to 1e12 times as large as residuals
