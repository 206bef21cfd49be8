"""Checks and measurements of results: verify, compare, perplexity, brute force, bench, advise."""

from ._advice import Advice, advise
from ._brute_force import best_pruning, excess
from ._compare import compare
from ._evaluate import Evaluation, evaluate
from ._perplexity import (
    Perplexity,
    final_states,
    mean_kl,
    perplexity,
    perplexity_of,
    streamed_evaluation,
    streamed_perplexity,
)
from ._samples import compare_samples
from ._verify import BoundReport, Verification, verify

__all__ = [
    "Advice",
    "BoundReport",
    "Evaluation",
    "Perplexity",
    "Verification",
    "advise",
    "best_pruning",
    "compare",
    "compare_samples",
    "evaluate",
    "excess",
    "final_states",
    "mean_kl",
    "perplexity",
    "perplexity_of",
    "streamed_evaluation",
    "streamed_perplexity",
    "verify",
]
