"""A model of Hugging Face transformers, seen as decoder layers that can be called one by one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune._device.products import widened
from convexprune._layerwise.model import AbstractModel, Call, DecoderLayer

from ._checkpoints.admission import (
    refuse_adapters,
    refuse_inference_mode,
    refuse_non_finite,
    refuse_other_dtypes,
    refuse_quantized,
    refuse_unloaded,
)
from ._checkpoints.given import OriginalState
from ._checkpoints.origin import Origin, origin_of_loaded
from ._checkpoints.shards import Shards
from ._data.logits import logits_at, pieces
from ._discovery.calling import CallRecorder, entering, standing_in
from ._discovery.discovery import discover
from ._discovery.family import decoder_layers, positions
from ._discovery.kinds import of_each_kind
from ._discovery.layout import Layout
from ._discovery.operators import computes_on, put, tensor_of
from ._discovery.replay import refuse_looking_ahead, refuse_other_replays
from ._discovery.selection import left_alone

PROBE_TOKENS = 16
"""How many tokens are sent through the model to see what its layers do."""


class HuggingFaceModel(AbstractModel):
    """A causal language model and, to read text, its tokenizer; loaded, or with layers that come out of shards.

    The model is used in place: it is put in evaluation mode and its parameters stop asking for gradients, until it is
    given back (`lent`). `layers` holds every decoder layer; the stages of each hold only the operators to be pruned.
    `left_alone` lists every other linear map of the model, and every other matrix of its decoder layers, with the
    reason.

    Args:
        model: the model of transformers.
        tokenizer: of the model, if it has one.
        name: what to call it; None is its own name.
        targets: see `convexprune.adapters._discovery.selection.left_alone`.
        ignore: see `convexprune.adapters._discovery.selection.left_alone`.
        shards: where its layers come from if it streams.
        whole_because: why it does not stream.

    Raises:
        ModelError: the model is quantized, not loaded, wrapped in an adapter or not finite; its decoder layers are
            not to be found, or do not give its own outputs when they are called one by one; `targets` or `ignore`
            name what does not exist or leave nothing to prune.
        RecipeError: `targets` or `ignore` hold a bad regular expression.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    layers: Sequence[DecoderLayer]
    left_alone: list[tuple[str, str]]

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        targets: Sequence[str] = ("Linear",),
        ignore: Sequence[str] = (),
        shards: Shards | None = None,
        whole_because: str = "it was given loaded",
    ) -> None:
        refuse_adapters(model)
        refuse_inference_mode(model)
        refuse_quantized(model.config)
        path, layers = decoder_layers(model)
        self.shards = shards
        self.whole_because = whole_because
        if not self.streams:
            refuse_unloaded(model)
            refuse_non_finite(model)
        refuse_other_dtypes(layers)
        self.name = name or model.name_or_path or type(model).__name__
        self.model = model
        self.tokenizer = tokenizer
        self.layers = [DecoderLayer(f"{path}.{i}", layer, ()) for i, layer in enumerate(layers)]
        self._original, self._keeps = OriginalState(model), False
        model.eval().requires_grad_(False)
        with ExitStack() as refused:
            refused.callback(self._original.restore)
            self._look(targets, ignore)
            refused.pop_all()

    def _look(self, targets: Sequence[str], ignore: Sequence[str]) -> None:
        refuse_other_replays(self)
        refuse_looking_ahead(self)
        self._layouts = self._look_at_layers()
        self.choose(targets, ignore)

    def choose(self, targets: Sequence[str], ignore: Sequence[str] = (), **reason: str) -> None:
        """Prune these operators, and no others.

        Args:
            targets: see `convexprune.adapters._discovery.selection.left_alone`.
            ignore: see `convexprune.adapters._discovery.selection.left_alone`.
            reason: see `convexprune.adapters._discovery.selection.left_alone`, by its name `because`.

        Raises:
            ModelError: they name what does not exist or leave nothing to prune.
            RecipeError: a bad regular expression.
        """
        reasons = left_alone(self.model, self._layouts, targets, ignore, **reason)
        self.layers = [_bound(layer, self._layouts[layer.name], reasons) for layer in self.layers]
        self.left_alone = list(reasons.items())

    @contextmanager
    def lent(self, undo: bool = False) -> Iterator[Self]:
        """Inside, the model is a run's; afterwards its modules' modes and `requires_grad` are as they were given.

        Args:
            undo: restore the weights of its decoder layers, too, if the run raises. It costs a copy of the layers that
                have changed, in the memory of the CPU.

        Yields:
            The model.
        """
        self._keeps = undo
        try:
            with ExitStack() as failed:
                failed.callback(self._put_back)
                yield self
                failed.pop_all()
        finally:
            self._keeps = False
            self._original.restore()

    def _put_back(self) -> None:
        self._keeps = False
        for layer in self.layers:
            self.load_state(layer, self._original.layers.get(layer.name, {}))

    @property
    def folder(self) -> Path | None:
        """The folder that it was read from; None if it was a name on the hub that was loaded whole, or nobody knows."""
        if self.shards is not None:
            return self.shards.folder
        path = Path(self.name).expanduser()
        return path if path.is_dir() else None

    @property
    def device(self) -> torch.device:
        """Where token ids go; of an offloaded model, where accelerate computes."""
        own = self.model.get_input_embeddings().weight
        assert isinstance(own, Tensor)
        if not own.is_meta:
            return own.device
        return next(device for m in self.model.modules() if (device := computes_on(m)))

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to one less than this."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding.num_embeddings

    @property
    def max_positions(self) -> int:
        """The most tokens that the model can see at once."""
        return positions(self.model.config)

    def origin(self) -> Origin:
        """What this model was made of, as it is now: of its files if it streams, else of what is in memory.

        Returns:
            The checksums.

        Raises:
            ModelError: a weight of a file is NaN or infinite, a file has changed since it was opened, or the tokenizer
                cannot be saved.
        """
        return origin_of_loaded(self.model, self.tokenizer) if self.shards is None else self.shards.origin()

    @property
    def streams(self) -> bool:
        return self.shards is not None

    def resident(self, layer: DecoderLayer) -> AbstractContextManager[None]:
        """See `AbstractModel.resident`; of a loaded model everything always is."""
        return nullcontext() if self.shards is None else self.shards.resident(layer)

    def prefetch(self, layer: DecoderLayer) -> None:
        """See `AbstractModel.prefetch`: of a streamed model, the shards are read into the system's cache."""
        if self.shards is not None:
            self.shards.prefetch(layer)

    def state(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """See `AbstractModel.state`; what is offloaded comes from where it is kept."""
        return {name: tensor_of(layer.module, name) for name in layer.module.state_dict()}

    def load_state(self, layer: DecoderLayer, state: Mapping[str, Tensor]) -> None:
        """See `AbstractModel.load_state`."""
        self.keep(layer)
        for name, value in state.items():
            path, _, last = name.rpartition(".")
            put(layer.module.get_submodule(path), last, value)

    def keep(self, layer: DecoderLayer) -> None:
        """See `AbstractModel.keep`; only while it is lent so that it can be undone."""
        if self._keeps:
            self._original.keep(layer.name, self.state(layer))

    @torch.no_grad()
    def first_inputs(self, batch: Tensor) -> Tensor:
        """The hidden states [batch tokens hidden] that enter the first decoder layer for `batch` [batch tokens]."""
        return entering(self.layers[0], lambda: self.forward(batch))

    @torch.no_grad()
    def calls(self, batch: Tensor) -> list[Call]:
        """How each decoder layer is called for a batch of this shape; recorded on a forward pass.

        Layer by layer, because some families give each layer its own mask or rotary table.
        """
        self._recorder = CallRecorder(self.name, self.layers)
        with self.resident(self.layers[0]):
            return self._recorder.record(lambda: self.forward(batch))

    def probe_tokens(self) -> Tensor:
        """Token ids [1 tokens], all different."""
        length = min(PROBE_TOKENS, self.max_positions)
        return torch.linspace(0, self.vocab_size - 1, length, device=self.device).long()[None]

    def probe(self) -> tuple[Tensor, list[Call]]:
        """A small input for experiments.

        Returns:
            Hidden states [1 tokens n] that enter the first decoder layer, and how every layer is called.
        """
        batch = self.probe_tokens()
        return self.first_inputs(batch), self.calls(batch)

    def _look_at_layers(self) -> dict[str, Layout]:
        """The layout of each layer by its name; equal layers are watched once."""
        found = of_each_kind(self, lambda layer, call, hidden: discover(layer.module, call, hidden))
        return {layer.name: layout for layer, layout in zip(self.layers, found, strict=True)}

    def pieces(self, batch: Tensor) -> tuple[Tensor, ...]:
        """The positions that predict a token, in pieces as large as logits are computed at once.

        Args:
            batch: token ids [batch tokens].

        Returns:
            The positions of each piece.
        """
        return pieces(self.model, batch)

    def logits(self, batch: Tensor, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """The logits that the hidden states after the last decoder layer lead to; they have gradients if these have.

        Args:
            batch: token ids [batch tokens].
            hidden: after the last decoder layer [batch tokens hidden].
            positions: which are wanted; None is all.

        Returns:
            [batch positions vocabulary].
        """
        with standing_in(self.layers, lambda *_, **__: self._recorder.returned(hidden)):
            return logits_at(self.model, batch.to(self.device), positions)

    def forward(self, batch: Tensor) -> Tensor:
        """Send a batch through the decoder.

        Args:
            batch: token ids [batch tokens].

        Returns:
            The hidden states [batch tokens hidden] that the head gets.
        """
        # Without a cache: a recorded one would grow at each replay. Without the head: nobody reads the logits.
        with widened(self.device, self.model.dtype):
            return self.model.base_model(input_ids=batch.to(self.device), use_cache=False)[0]

    def normed(self, batch: Tensor, hidden: Tensor) -> Tensor:
        """The hidden states that the head gets: those after the final norm.

        Args:
            batch: token ids [batch tokens].
            hidden: after the last decoder layer [batch tokens hidden].

        Returns:
            [batch tokens hidden].
        """
        with standing_in(self.layers, lambda *_, **__: self._recorder.returned(hidden)):
            return self.forward(batch)


def _bound(layer: DecoderLayer, layout: Layout, reasons: Mapping[str, str]) -> DecoderLayer:
    return layout.bind(layer.name, layer.module, lambda place: f"{layer.name}.{place.name}" not in reasons)
