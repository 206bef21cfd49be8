"""The weights of calibration tokens, by operator, as the recipe's setting `token_weights` asks for them."""

from collections.abc import Callable, Mapping

from torch import Tensor

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.token_weights import TokenWeighting, loss_weights, sink_weights

from ._discovery.mixing import read_by_other_tokens
from ._gradients import loss_fisher
from ._huggingface import HuggingFaceModel


def token_weights(
    model: HuggingFaceModel,
    asked: TokenWeighting,
    calibration: Tensor,
    batch_size: int = 1,
    store: FolderStore | None = None,
) -> Mapping[str, Tensor]:
    """Return weights [windows length] of the `calibration` tokens by "layer.operator"; the others count all alike.

    Those of "loss" are found once for all processes that share the `store` and for whoever goes on with its run.
    """
    if asked.kind == "attention_sink":
        weights = sink_weights(len(calibration), calibration.shape[1], asked.share)
        return {name: weights for name in read_by_other_tokens(model)}
    if asked.kind == "none":
        return {}

    def find(record: Callable[[], Recorded]) -> dict[str, Tensor]:
        squares = loss_fisher(model, calibration, batch_size, record, by_token=True).tokens
        return {name: loss_weights(each, asked.share) for name, each in squares.items()}

    def keep(store: FolderStore) -> dict[str, Tensor]:
        with store.scratch(0) as record:
            return find(record)

    return find(list) if store is None else store.tensors_once("token_weights", lambda: keep(store))
