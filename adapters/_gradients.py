"""How much the outputs of each operator move the loss: a diagonal Fisher estimate on the calibration tokens."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from convexprune._device.memory import lacks_memory
from convexprune._device.products import widened
from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.model import DecoderLayer
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerCalls, LayerContext, LayerWalk, propagate
from convexprune._progress import begin
from convexprune.errors import ModelError

from ._discovery.experts import FusedExperts, Product, fused_parameters
from ._discovery.operators import LINEAR_MODULES, Place
from ._huggingface import HuggingFaceModel

WITHOUT = "take an allocation without gradients (allocation='uniform')"


def output_fisher(
    model: HuggingFaceModel, tokens: Tensor, batch_size: int = 1, record: Callable[[], Recorded] = list
) -> dict[str, Tensor]:
    """The empirical Fisher information of the outputs of each operator, f_i = mean over tokens of (d loss / d y_i)^2.

    The loss is the summed negative log-likelihood of a window (the labels are the text's own). It is differentiated
    layer by layer, from the last to the first, so that a model that streams has one decoder layer at a time in memory;
    what enters each of its layers is recorded meanwhile.

    An expert's f is of its own tokens, divided by the number of all: weighing a mean over its tokens, it counts them.

    Args:
        model: the model.
        tokens: token ids [windows length].
        batch_size: windows at once.
        record: makes a place for what enters a layer.

    Returns:
        f [m] by "layer.operator".

    Raises:
        ModelError: a gradient is not finite; the last operator is named where one is not. Or torch cannot
            differentiate the model, a kernel of its own without a backward pass, say.
    """
    squares = _Squares(model)
    batches = list(tokens.split(batch_size))
    calls = LayerCalls(model, batches)
    parts = [batches] if model.streams else [[batch] for batch in batches]  # of a streamed model, read layers once
    count = len(model.layers)
    on_layer = begin("gradients", 2 * len(parts) * count)
    for part in parts:
        states = MemoryStore(range(count), record, keep=True)
        LayerWalk(model, part, states, on_layer=on_layer, calls=calls).run(propagate)
        with _differentiable("What follows the decoder layers"), widened(model.device, model.model.dtype):
            gradients = [_loss_gradient(model, ids, x) for ids, x in zip(part, states.take(count), strict=True)]
        backward = _Backward(gradients, squares)
        LayerWalk(model, part, states.backward(), on_layer=on_layer, calls=calls).run(backward)
    for name, total in reversed(squares.sums.items()):  # it is not finite from there back
        if not bool(total.isfinite().all()):
            raise ModelError(
                f"The gradient of the loss at the outputs of {name} is not finite on the calibration tokens. Load the "
                f"model in a wider dtype (dtype='float32'), or {WITHOUT}."
            )
    return {name: (total / tokens.numel()).float() for name, total in squares.sums.items()}


@contextmanager
def _differentiable(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if lacks_memory(error):
            raise
        raise ModelError(f"{what} cannot be differentiated: {error} To prune it all the same, {WITHOUT}.") from error


@torch.enable_grad()
def _loss_gradient(model: HuggingFaceModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """d loss / d hidden, from the logits of a few positions at a time."""
    hidden = hidden.detach().requires_grad_()
    gradient = torch.zeros_like(hidden)
    for positions in model.pieces(ids):
        logits = model.logits(ids, hidden, positions).float()
        labels = ids[:, positions.to(ids.device) + 1].to(logits.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        gradient += torch.autograd.grad(loss, hidden)[0]
    return gradient


class _Squares:
    """The squared gradients of the outputs [m] of each operator, "layer.operator", summed over tokens."""

    def __init__(self, model: HuggingFaceModel) -> None:
        self.sums = {
            f"{layer.name}.{operator.name}": torch.zeros(operator.shape[0], dtype=torch.float64, device=model.device)
            for layer in model.layers
            for operator in layer.operators
        }
        self._waiting = set[str]()

    def add(self, name: str, gradient: Tensor) -> None:
        """Count the gradient [... m] of some tokens."""
        squares = gradient.float().square().flatten(0, -2)
        self.sums[name] += squares.sum(0, dtype=torch.float64).to(self.sums[name].device)
        self._waiting.discard(name)

    def watch(self, name: str, _: nn.Module, __: object, output: Tensor) -> None:
        """A forward hook of the module that is the operator."""
        self._waiting.add(name)
        output.register_hook(partial(self.add, name))

    def hear(self, pile: str, product: Product) -> None:
        """What a pile of experts, by its "layer.path", tells of its backward pass."""
        place = Place(pile, product.slice.parameter, product.slice.index)
        if place.name in self.sums:
            self.add(place.name, product.inputs)

    def require_all(self) -> None:
        """Raise a RuntimeError if a module was watched whose outputs got no gradient since."""
        if self._waiting:
            raise RuntimeError(f"no gradient reaches the outputs of {min(self._waiting)}.")


class _Backward:
    """The step of a walk from the last layer to the first: squares and adds the gradients of a layer's operators.

    `gradients` are those of what leaves the layer, of each batch; then they are those of what enters it.
    """

    def __init__(self, gradients: list[Tensor], squares: _Squares) -> None:
        self._gradients, self._squares = gradients, squares

    @torch.enable_grad()
    def __call__(self, context: LayerContext) -> None:
        layer = context.layer
        leaving = self._gradients[0]
        with _differentiable(layer.name), widened(leaving.device, leaving.dtype), ExitStack() as hooks:
            experts = self._watch(layer, hooks)
            before = list[Tensor]()
            for entering, gradient in zip(context.inputs["dense"], self._gradients, strict=True):
                hidden = entering.detach().requires_grad_()
                output = context.calls(hidden)(layer.module, hidden)
                with ExitStack() as heard:
                    for name, pile in experts.items():
                        heard.enter_context(pile.hooked_backward(partial(self._squares.hear, name)))
                    before.append(torch.autograd.grad(output, hidden, gradient)[0])
                self._squares.require_all()
        self._gradients = before

    def _watch(self, layer: DecoderLayer, hooks: ExitStack) -> dict[str, FusedExperts]:
        """Hook the modules that are operators; fused experts are returned, by "layer.path"."""
        experts = dict[str, FusedExperts]()
        for path, module in layer.module.named_modules():
            name = f"{layer.name}.{path}".removesuffix(".")
            if isinstance(module, LINEAR_MODULES) and name in self._squares.sums:
                hooks.enter_context(module.register_forward_hook(partial(self._squares.watch, name)))
            elif fused_parameters(module):
                experts[name] = FusedExperts(module)
                hooks.enter_context(experts[name].looped())
        return experts
