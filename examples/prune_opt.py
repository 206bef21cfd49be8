"""Prune the OPT model that is bundled with convexprune to half of its weights, and see what it costs.

python examples/prune_opt.py [CALIBRATION SAMPLES]
"""

import sys

from rich import print

import convexprune

samples = int(sys.argv[1]) if len(sys.argv) > 1 else 64
result = convexprune.prune(solver="fista", sparsity=0.5, num_calibration_samples=samples, evaluation="self")
print(result.report.table())
for name, perplexity in result.report.perplexity.items():
    print(f"perplexity of the {name} model on text that it sampled itself: {perplexity['value']:.2f}")
print(f"largest relative duality gap of a final solve: {result.report.largest_gap:.1e}")
