"""A model of Hugging Face transformers as decoder layers that can be called singly."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune._device.precision import widened
from convexprune._layerwise.model import Call, DecoderLayer

from ._checkpoints.admission import refuse_non_finite, refuse_quantized, require_plain, told_if_failing
from ._checkpoints.origin import Origin, OriginalState, origin_of_loaded, used_alone
from ._checkpoints.shards import Shards
from ._discovery.discovery import discover
from ._discovery.family import decoder_layers, positions, vocabulary
from ._discovery.operators import computes_on, put, tensor_of
from ._discovery.passes import CallRecorder, entering, logits_at, pieces, standing_in
from ._discovery.probing import ProbedModel, of_each_kind, refuse_looking_ahead, refuse_other_replays
from ._discovery.selection import left_alone

PROBE_TOKENS = 16
"""How many tokens are sent through the model to see what its layers do."""


class HuggingFaceModel(ProbedModel):
    """A causal language model and, to read text, its tokenizer; loaded, or with layers streamed from shards.

    The model is used in place: evaluation mode, and parameters without gradients, until the model is given back
    (`lent`). `layers` holds every decoder layer; the stages hold only the operators to prune. `left_alone` lists every
    other linear map of the model, and every other matrix of its decoder layers, with the reason. Refused are models
    that are quantized, not loaded, wrapped in an adapter or not finite, or that their layers, called singly, are not.
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
        refuse_quantized(model.config)
        self.shards = shards
        self.whole_because = whole_because
        require_plain(model, loaded=not self.streams)
        path, layers = decoder_layers(model)
        if not self.streams:
            refuse_non_finite(model)
        self.name = name or model.name_or_path or type(model).__name__
        self.model = model
        self.tokenizer = tokenizer
        self.layers = [DecoderLayer(f"{path}.{i}", layer, ()) for i, layer in enumerate(layers)]
        self._original, self._keeps = OriginalState(model), False
        model.eval().requires_grad_(False)
        with used_alone(model), ExitStack() as refused:
            refused.callback(self._original.restore)
            with told_if_failing(model):
                refuse_other_replays(self)
                refuse_looking_ahead(self)
                found = of_each_kind(self, lambda layer, call, hidden: discover(layer.module, call, hidden))
                self._layouts = {layer.name: layout for layer, layout in zip(self.layers, found, strict=True)}
            self.choose(targets, ignore)
            refused.pop_all()

    def choose(self, targets: Sequence[str], ignore: Sequence[str] = (), **reason: str) -> None:
        """Choose the operators to prune, by patterns of `left_alone`; a `reason` is named `because`, as there."""
        reasons = left_alone(self.model, self._layouts, targets, ignore, **reason)
        left = reasons.keys()
        self.layers = [
            self._layouts[layer.name].bind(layer.name, module=layer.module, left_alone=left) for layer in self.layers
        ]
        self.left_alone = list(reasons.items())

    @contextmanager
    def lent(self, undo: bool = False) -> Iterator[Self]:
        """Lend the model to a run; afterwards its modules' modes and `requires_grad` are restored.

        With `undo` the weights of its decoder layers are restored, too, if the run raises. This costs a copy of changed
        layers, in the memory of the CPU.
        """
        self._keeps = undo
        try:
            with used_alone(self.model), ExitStack() as failed:
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
        """The model's folder; None for a name on the hub that was loaded whole, or if unknown."""
        if self.shards is not None:
            return self.shards.folder
        path = Path(self.name).expanduser()
        return path if path.is_dir() else None

    @property
    def device(self) -> torch.device:
        """The device of token ids; for an offloaded model, where accelerate computes."""
        own = self.model.get_input_embeddings().weight
        assert isinstance(own, Tensor)
        if not own.is_meta:
            return own.device
        return next(device for m in self.model.modules() if (device := computes_on(m)))

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary: token ids run from 0 to one less."""
        return vocabulary(self.model)

    @property
    def max_positions(self) -> int:
        """The most tokens that the model can see at once."""
        return positions(self.model.config)

    def origin(self) -> Origin:
        """Return checksums of the model's present sources: files if streamed, else tensors in memory."""
        return origin_of_loaded(self.model, self.tokenizer) if self.shards is None else self.shards.origin()

    @property
    def streams(self) -> bool:
        return self.shards is not None

    def resident(self, layer: DecoderLayer) -> AbstractContextManager[None]:
        return nullcontext() if self.shards is None else self.shards.resident(layer)

    def prefetch(self, layer: DecoderLayer) -> None:
        if self.shards is not None:
            self.shards.prefetch(layer)

    def state(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Return the layer's tensors; offloaded tensors come from their place of storage."""
        return {name: tensor_of(layer.module, name) for name in layer.module.state_dict()}

    def load_state(self, layer: DecoderLayer, state: Mapping[str, Tensor]) -> None:
        self.keep(layer)
        for name, value in state.items():
            path, _, last = name.rpartition(".")
            put(layer.module.get_submodule(path), last, value)

    def keep(self, layer: DecoderLayer) -> None:
        """Note the layer's weights, if the model is lent with `undo`."""
        if self._keeps:
            self._original.keep(layer.name, self.state(layer))

    @torch.no_grad()
    def first_inputs(self, batch: Tensor) -> Tensor:
        """The hidden states [batch tokens hidden] that enter the first decoder layer for `batch` [batch tokens]."""
        return entering(self.layers[0], lambda: self.forward(batch))

    @torch.no_grad()
    def calls(self, batch: Tensor) -> list[Call]:
        """Return the calls of all decoder layers for a batch of this shape, recorded in a forward pass.

        Calls differ by layer, because some families give every layer a separate mask or rotary table.
        """
        self._recorder = CallRecorder(self.name, self.layers)
        with self.resident(self.layers[0]):
            return self._recorder.record(lambda: self.forward(batch))

    def probe_tokens(self) -> Tensor:
        length = min(PROBE_TOKENS, self.max_positions)
        return torch.linspace(0, self.vocab_size - 1, length, device=self.device).long()[None]

    def probe(self) -> tuple[Tensor, list[Call]]:
        """Return a few hidden states [1 tokens n] that enter the first layer, and the calls of all layers."""
        batch = self.probe_tokens()
        return self.first_inputs(batch), self.calls(batch)

    def pieces(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return the positions that predict a token of `batch` [batch tokens], in pieces for logits."""
        return pieces(self.model, batch)

    def logits(self, batch: Tensor, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the logits [batch positions vocabulary] of hidden states [batch tokens hidden] after the last layer.

        Logits have gradients if the hidden states have. Without `positions` all are meant.
        """
        with standing_in(self.layers, lambda *_, **__: self._recorder.returned(hidden)):
            return logits_at(self.model, batch.to(self.device), positions)

    def forward(self, batch: Tensor) -> Tensor:
        """Send `batch` [batch tokens] through the decoder; return the hidden states [batch tokens hidden] for the
        head.
        """
        # Without a cache: a recorded one would grow at each replay. Without the head: nobody reads the logits.
        with widened(self.device, self.model.dtype):
            return self.model.base_model(input_ids=batch.to(self.device), use_cache=False)[0]

    def normed(self, batch: Tensor, hidden: Tensor) -> Tensor:
        """Return the inputs of the head: `hidden` [batch tokens hidden] after the final norm."""
        with standing_in(self.layers, lambda *_, **__: self._recorder.returned(hidden)):
            return self.forward(batch)
