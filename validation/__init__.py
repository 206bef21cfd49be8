"""Checks and measurements of results: verify, compare, perplexity, bench, advise."""

from ._advice import Advice, advise
from ._compare import compare
from ._evaluate import Evaluation, evaluate
from ._perplexity import Perplexity, perplexity
from ._samples import compare_samples
from ._verify import Verification, verify

__all__ = [
    "Advice",
    "Evaluation",
    "Perplexity",
    "Verification",
    "advise",
    "compare",
    "compare_samples",
    "evaluate",
    "perplexity",
    "verify",
]
