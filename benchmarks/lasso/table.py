"""The CPU seconds to a certified gap of 1e-4 and 1e-8, by solver, of the benchmark in this folder.

    python benchmarks/lasso/table.py

A solver's tolerance falls by tens until the certificate meets the gap; the time is the best of three runs at that
tolerance: seconds of a core.
"""

import time
from itertools import product
from pathlib import Path

from benchopt.benchmark import Benchmark

GAPS = (1e-4, 1e-8)


def seconds(solver, objective, gap: float) -> float:
    for exponent in range(2, 16):
        began = time.process_time()
        solver.run(10.0**-exponent)
        best = time.process_time() - began
        if objective.evaluate_result(**solver.get_result())["value"] <= gap:
            for _ in range(2):
                began = time.process_time()
                solver.run(10.0**-exponent)
                best = min(best, time.process_time() - began)
            return best
        if best > 20:
            break
    return float("nan")


def variants(classes):
    for cls in classes:
        names = [name.strip() for key in cls.parameters for name in key.split(",")]
        for values in product(*cls.parameters.values()):
            flat = [
                v for value, key in zip(values, cls.parameters, strict=True) for v in (value if "," in key else [value])
            ]
            yield cls.get_instance(**dict(zip(names, flat, strict=True)))


def main() -> None:
    benchmark = Benchmark(Path(__file__).parent)
    objective_class = benchmark.get_benchmark_objective()
    solvers = list(variants(benchmark.get_solvers()))
    names = [" ".join(map(str, solver._parameters.values())) for solver in solvers]
    print(f"| data | divisor | gap | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for dataset in variants(benchmark.get_datasets()):
        data = dataset.get_data()
        name = f"{dataset.name} {' '.join(map(str, dataset._parameters.values()))}"
        for divisor in objective_class.parameters["divisor"]:
            objective = objective_class.get_instance(divisor=divisor)
            objective.set_data(**data)
            for solver in solvers:
                solver.set_objective(**objective.get_objective())
            for gap in GAPS:
                times = [f"{seconds(solver, objective, gap):.4f}" for solver in solvers]
                print(f"| {name} | {divisor} | {gap:.0e} | {' | '.join(times)} |", flush=True)


if __name__ == "__main__":
    main()
