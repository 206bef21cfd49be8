"""The CPU seconds to a certified gap of 1e-4 and 1e-8, by solver, of the benchmark in this folder.

    python benchmarks/lasso/table.py [--data 'gram[model=DIR,operator=mlp.down_proj,rows=16]' ...]

The data are those of benchopt's `-d`; without any, all. A solver's tolerance falls by tens until the certificate meets the gap; the time is the best of three runs at that
tolerance: seconds of a core.
"""

import argparse
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
    for cls, parameters in classes:
        names = [name.strip() for key in parameters for name in key.split(",")]
        lists = [value if isinstance(value, list) else [value] for value in parameters.values()]
        for values in product(*lists):
            flat = [
                v for value, key in zip(values, parameters, strict=True) for v in (value if "," in key else [value])
            ]
            yield cls.get_instance(**dict(zip(names, flat, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="NAME[SETTING=VALUE,...]")
    given = parser.parse_args().data
    benchmark = Benchmark(Path(__file__).parent)
    objective_class = benchmark.get_benchmark_objective()
    solvers = list(variants((cls, cls.parameters) for cls in benchmark.get_solvers()))
    names = [" ".join(map(str, solver._parameters.values())) for solver in solvers]
    print(f"| data | divisor | gap | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    whole = [(cls, cls.parameters) for cls in benchmark.get_datasets()]
    for dataset in variants(benchmark.check_dataset_patterns(given) if given else whole):
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
