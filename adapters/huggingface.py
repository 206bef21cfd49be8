"""A model of Hugging Face transformers, seen as decoder layers that can be called one by one."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune.model import AbstractModel, Call, DecoderLayer, Group, LinearOperator, ModuleInput

from .admission import refuse_foreign_operators, refuse_non_finite, refuse_offloaded, refuse_quantised
from .family import Family, family_of
from .selection import left_alone


class HuggingFaceModel(AbstractModel):
    """A loaded causal language model and, to read text, its tokenizer.

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
    ) -> None:
        family = family_of(model.config)
        refuse_quantised(model.config)
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
        """How each decoder layer is called for a batch of this shape; recorded on one real forward pass.

        Layer by layer, because some families give each layer its own mask or rotary table.
        """
        recorded: list[Call] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded.append(_split(args, kwargs)[1])

        hooks = [layer.module.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
        try:
            self._forward(batch)
        finally:
            for hook in hooks:
                hook.remove()
        assert len(recorded) == len(self.layers)
        return recorded

    def _forward(self, batch: Tensor) -> None:
        # Without a cache: a recorded one would grow at each replay. Without the head: nobody reads the logits.
        self.model.base_model(input_ids=batch.to(self.model.device), use_cache=False)


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
