"""The weights of calibration tokens, by operator, as the recipe's setting `token_weights` asks for them."""

from torch import Tensor

from convexprune._layerwise.token_weights import TokenWeighting, sink_weights

from ._discovery.mixing import read_by_other_tokens
from ._huggingface import HuggingFaceModel


def token_weights(model: HuggingFaceModel, asked: TokenWeighting, calibration: Tensor) -> dict[str, Tensor]:
    """Return weights [windows length] of the `calibration` tokens by "layer.operator"; the others count all alike."""
    if asked.kind == "none":
        return {}
    weights = sink_weights(len(calibration), calibration.shape[1], asked.share)
    return {name: weights for name in read_by_other_tokens(model)}
