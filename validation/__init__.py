from .brute_force import best_pruning, excess
from .compare import compare
from .perplexity import Perplexity, perplexity, perplexity_of, streamed_perplexity
from .samples import compare_samples
from .verify import BoundReport, Verification, verify

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
