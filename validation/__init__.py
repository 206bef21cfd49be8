from .perplexity import Perplexity, perplexity, perplexity_of

__all__ = ["Perplexity", "perplexity", "perplexity_of"]
