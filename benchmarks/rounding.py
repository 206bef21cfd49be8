"""What coarse products cost: errors of a model pruned with each format, over those with float32, emulated on the CPU.

    python benchmarks/rounding.py [MODEL] [--samples 16] [--methods convex,admm] [--patterns unstructured,2:4]

Errors are means over the operators, on calibration and on held-out tokens; the gap is the largest of the run.
"""

import argparse
from statistics import fmean

import convexprune

CASES = {
    "gram tf32": {"gram_precision": "tf32"},
    "gram bf16x3": {"gram_precision": "bf16x3"},
    "solve tf32": {"solve_precision": "tf32"},
    "solve bf16x3": {"solve_precision": "bf16x3"},
    "both bf16x3 (auto on a GPU)": {"gram_precision": "bf16x3", "solve_precision": "bf16x3"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--methods", default="convex,admm")
    parser.add_argument("--patterns", default="unstructured,2:4")
    args = parser.parse_args()
    print("| method | pattern | format | error | on held-out tokens | largest gap |\n|---|---|---|---|---|---|")
    for method in args.methods.split(","):
        for pattern in args.patterns.split(","):
            asked = {"method": method, "pattern": pattern, "num_calibration_samples": args.samples, "bound_rows": 0}
            exact = errors(args.model, gram_precision="float32", solve_precision="float32", **asked)
            print(f"| {method} | {pattern} | float32 | {exact[0]:.5f} | {exact[1]:.5f} | {exact[2]:.1e} |", flush=True)
            for name, formats in CASES.items():
                found = errors(
                    args.model, **{"gram_precision": "float32", "solve_precision": "float32"} | formats | asked
                )
                more = [f"{100 * (one / other - 1):+.3f} %" for one, other in zip(found[:2], exact[:2], strict=True)]
                print(f"| {method} | {pattern} | {name} | {' | '.join(more)} | {found[2]:.1e} |", flush=True)


def errors(model: str | None, **settings) -> tuple[float, float, float]:
    report = convexprune.prune(model, threads=1, **settings).report
    held_out = [o.held_out_error for o in report.operators if o.held_out_error is not None]
    return fmean(o.relative_error for o in report.operators), fmean(held_out), report.largest_gap or 0.0


if __name__ == "__main__":
    main()
