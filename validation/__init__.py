from .compare import compare
from .perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "compare", "perplexity"]
