from .compare import compare
from .perplexity import Perplexity, perplexity, perplexity_of

__all__ = ["Perplexity", "compare", "perplexity", "perplexity_of"]
