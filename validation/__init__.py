from .brute_force import best_pruning, excess
from .perplexity import Perplexity, perplexity
from .verify import BoundReport, Verification, verify

__all__ = ["BoundReport", "Perplexity", "Verification", "best_pruning", "excess", "perplexity", "verify"]
