"""What shows that a result is right and good: verify, compare, perplexity, brute force, bench."""

from ._brute_force import best_pruning, excess
from ._compare import compare
from ._perplexity import Perplexity, perplexity, perplexity_of, streamed_perplexity
from ._samples import compare_samples
from ._verify import BoundReport, Verification, verify

__all__ = [
    "BoundReport",
    "Perplexity",
    "Verification",
    "best_pruning",
    "compare",
    "compare_samples",
    "excess",
    "perplexity",
    "perplexity_of",
    "streamed_perplexity",
    "verify",
]
