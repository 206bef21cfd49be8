"""Prune on a Ray cluster: it is joined if there is one (`ray start --head`), else made of this machine.

python examples/ray_cluster.py MODEL TEXT OUTPUT [--workers N] [--plan]   (nothing given: a plan for the bundled OPT)
"""

import argparse

import convexprune

parser = argparse.ArgumentParser(description="Prune on a Ray cluster.")
parser.add_argument("model", nargs="?")
parser.add_argument("text", nargs="?", default="self")
parser.add_argument("output", nargs="?")
parser.add_argument("--workers", type=int, default=2, help="tasks: one GPU each, or as many CPUs as threads")
parser.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
given = parser.parse_args()

if given.plan or given.output is None:
    plan = convexprune.inspect(given.model, dataset=given.text)
    print(
        f"{plan.zeros:,} of {plan.weights:,} weights of {plan.operators} operators, {sum(plan.seconds.values()):.0f} s"
    )
else:
    result = convexprune.prune(
        given.model,
        dataset=given.text,
        output_dir=given.output,
        executor="ray",
        workers=given.workers,
        threads=1,  # of each task; with as many the bits are those of any other executor
        resume=True,  # a script that is started again goes on
    )
    print(f"{result.report.sparsity:.1%} zeros in {len(result.report.operators)} operators: {given.output}")
