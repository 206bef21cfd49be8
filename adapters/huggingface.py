"""A model of Hugging Face transformers, seen as decoder layers that can be called one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune.model import AbstractModel, Call, DecoderLayer, Group, LinearOperator, ModuleInput
from convexprune.pipeline import checksum

from .admission import refuse_foreign_operators, refuse_non_finite, refuse_offloaded, refuse_quantised
from .family import Family, family_of
from .selection import left_alone
from .shards import Shards


class HuggingFaceModel(AbstractModel):
    """A causal language model and, to read text, its tokenizer; loaded, or with layers that come out of `shards`.

    The model is used in place: it is put in evaluation mode and its parameters stop asking for gradients.
    `layers` holds every decoder layer; the stages of each hold only the operators to be pruned. `left_alone` lists
    every other `nn.Linear` of the model with the reason.

    Raises:
        ModelError: the family is unknown; the model is quantised, offloaded, not finite or has other operators than
            its family; `targets` or `ignore` name what does not exist or leave nothing to prune.
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
        family = family_of(model.config)
        refuse_quantised(model.config)
        self.shards = shards
        self.whole_because = whole_because
        if shards is None:
            refuse_offloaded(model)
        refuse_foreign_operators(model, family)
        refuse_non_finite(model)
        reasons = left_alone(model, family, targets, ignore)
        self.name = name or model.name_or_path or type(model).__name__
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.layers = _decoder_layers(model, family, reasons)
        self.left_alone = list(reasons.items())

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to one less than this."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding.num_embeddings

    @property
    def max_positions(self) -> int:
        """The most tokens that the model can see at once."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # pyright: ignore[reportReturnType]

    def checksums(self) -> dict[str, str]:
        """What tells this model from any other: of its files if it streams, else of its tensors."""
        if self.shards is not None:
            return self.shards.checksums()
        return {name: checksum(tensor) for name, tensor in self.model.state_dict().items()}

    @property
    def streams(self) -> bool:
        return self.shards is not None

    def resident(self, layer: DecoderLayer) -> AbstractContextManager[None]:
        """See `AbstractModel.resident`; of a loaded model everything always is."""
        return nullcontext() if self.shards is None else self.shards.resident(layer)

    @torch.no_grad()
    def first_inputs(self, batch: Tensor) -> Tensor:
        """The hidden states [batch tokens hidden] that enter the first decoder layer for `batch` [batch tokens]."""
        reached: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached.append(_split(args, kwargs)[0])
            raise _Reached

        hook = self.layers[0].module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with suppress(_Reached):
                self._forward(batch)
        finally:
            hook.remove()
        return reached[0]

    @torch.no_grad()
    def calls(self, batch: Tensor) -> list[Call]:
        """How each decoder layer is called for a batch of this shape; recorded on a forward pass.

        Layer by layer, because some families give each layer its own mask or rotary table. Only the first layer
        computes; the others hand on what they get in the form that it returns, so that their weights are not needed.
        """
        recorded: list[Call] = []
        self._beside: tuple[Any, ...] | None = None  # what a layer returns beside the hidden states, if it is a tuple

        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            recorded.append(_split(args, kwargs)[1])
            self._beside = None if isinstance(output, Tensor) else tuple(output[1:])

        def bridge(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            recorded.append(call)
            return self._returned(hidden)

        hook = self.layers[0].module.register_forward_hook(watch, with_kwargs=True)
        try:
            with self.resident(self.layers[0]), _forwards(self.layers[1:], bridge):
                self._forward(batch)
        finally:
            hook.remove()
        assert len(recorded) == len(self.layers)
        return recorded

    @torch.no_grad()
    def logits(self, batch: Tensor, hidden: Tensor) -> Tensor:
        """The logits [batch tokens vocabulary] that the hidden states after the last decoder layer lead to.

        `calls` has to have seen a batch before.
        """
        with _forwards(self.layers, lambda *_, **__: self._returned(hidden)):
            return self.model(input_ids=batch.to(self.device), use_cache=False).logits

    def _returned(self, hidden: Tensor) -> Any:
        return hidden if self._beside is None else (hidden, *self._beside)

    def _forward(self, batch: Tensor) -> None:
        # Without a cache: a recorded one would grow at each replay. Without the head: nobody reads the logits.
        self.model.base_model(input_ids=batch.to(self.device), use_cache=False)


@contextmanager
def _forwards(layers: Sequence[DecoderLayer], forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the layers compute `forward` in place of their own."""
    before = [vars(layer.module).get("forward") for layer in layers]  # hooks of other libraries may stand there
    for layer in layers:
        layer.module.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.module.forward
            else:
                layer.module.forward = own


class _Reached(Exception):
    """Ends a forward pass at the first decoder layer."""


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, and all the other arguments of a decoder layer."""
    if args:
        return args[0], Call(args[1:], dict(kwargs))
    return kwargs["hidden_states"], Call((), {name: kwargs[name] for name in kwargs if name != "hidden_states"})


def _decoder_layers(model: PreTrainedModel, family: Family, reasons: Mapping[str, str]) -> list[DecoderLayer]:
    """Every decoder layer, with the stages that have something to prune."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = []
    for index, module in enumerate(model.get_submodule(family.layers).children()):
        name = f"{family.layers}.{index}"
        kept = {n: linears[f"{name}.{n}"] for stage in family.stages for n in stage if f"{name}.{n}" not in reasons}
        stages = ([LinearOperator(n, kept[n]) for n in stage if n in kept] for stage in family.stages)
        groups = (Group(tuple(stage), ModuleInput(stage[0].module)) for stage in stages if stage)
        layers.append(DecoderLayer(name, module, tuple((group,) for group in groups)))
    return layers
