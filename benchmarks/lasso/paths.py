"""CPU milliseconds of one core for a path of 100 strengths, of which every answer is within a certified relative gap.

    python benchmarks/lasso/paths.py

A peer's tolerance falls by tens until all its answers are within the gap. Ours certifies each answer in its time.
"""

import time
import warnings

import numpy as np
from celer import celer_path
from sklearn.linear_model import lasso_path

from convexprune import L1, Problem, Quadratic, certify, path

GAPS = (1e-4, 1e-8)
SIZES = ((1000, 300, 1e-2), (1000, 300, 1e-3), (300, 100, 1e-3))  # samples, inputs, the last strength over the first


def correlated(samples: int, inputs: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, inputs))
    for j in range(1, inputs):
        x[:, j] = 0.7 * x[:, j - 1] + 0.51**0.5 * x[:, j]
    y = x @ (rng.normal(size=inputs) * (rng.random(inputs) < 0.05))
    return np.asfortranarray(x), y + 0.3 * y.std() * rng.normal(size=samples)


def ours(x, y, strengths, gap: float):
    problem = Problem(Quadratic.least_squares(x, y), L1(1.0))
    return np.stack([solution.weight for solution in path(problem, strengths, tolerance=gap)], 1)


def milliseconds(work, *settings) -> float:
    best = np.inf
    for _ in range(4):
        began = time.process_time()
        work(*settings)
        best = min(best, time.process_time() - began)
    return 1e3 * best


def measured(peer, quadratic: Quadratic, strengths, gap: float) -> float:
    for tolerance in 10.0 ** -np.arange(2, 15):
        pairs = zip(strengths, peer(tolerance).T, strict=True)
        if max(certify(Problem(quadratic, L1(a)), w).relative_gap for a, w in pairs) <= gap:
            return milliseconds(peer, tolerance)
    return np.nan


def main() -> None:
    warnings.simplefilter("ignore")
    print(
        "| samples, inputs, last strength | gap | ours | scikit-learn-gram | scikit-learn | celer |\n|---|---|---|---|---|---|"
    )
    for samples, inputs, last in SIZES:
        x, y = correlated(samples, inputs)
        quadratic = Quadratic.least_squares(x, y)
        strengths = np.geomspace(1, last, 100) * float(quadratic.cross.abs().max())

        def of(library, given=(x, y), strengths=strengths, **settings):
            return lambda tolerance: library(*given, alphas=strengths, tol=tolerance, **settings)[1]

        peers = of(lasso_path, precompute=True), of(lasso_path, precompute=False), of(celer_path, pb="lasso")
        for gap in GAPS:
            times = [milliseconds(ours, x, y, strengths, gap)]
            times += [measured(peer, quadratic, strengths, gap) for peer in peers]
            print(
                f"| {samples}, {inputs}, {last} | {gap:.0e} | {' | '.join(f'{ms:.1f}' for ms in times)} |", flush=True
            )


if __name__ == "__main__":
    main()
