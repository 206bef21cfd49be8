"""How much the outputs of each operator move the loss: a diagonal Fisher estimate on the calibration tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from convexprune.errors import ModelError
from convexprune.model import DecoderLayer
from convexprune.pipeline import RecordedCalls
from convexprune.pipeline.machine import lacks_memory
from convexprune.pipeline.passes import Calls, Recorded
from convexprune.progress import Step, begin

from .experts import FusedExperts, Product, fused_parameters
from .huggingface import HuggingFaceModel
from .operators import LINEAR_MODULES, Place

WITHOUT = "take an allocation without gradients (allocation='uniform')"


def output_fisher(
    model: HuggingFaceModel, tokens: Tensor, batch_size: int = 1, record: Callable[[], Recorded] = list
) -> dict[str, Tensor]:
    """f_i = mean over tokens of (d loss / d y_i)^2 for the outputs y [m] of each operator, by "layer.operator".

    The loss is the summed negative log-likelihood of a window of `tokens` [windows length] (the empirical Fisher: the
    labels are the text's own). It is differentiated layer by layer, from the last to the first, so that a model that
    streams has one decoder layer at a time in memory; what enters each of its layers is recorded meanwhile.

    An expert's f is of its own tokens, divided by the number of all: weighing a mean over its tokens, it counts them.

    Raises:
        ModelError: a gradient is not finite; the last operator is named where one is not. Or torch cannot
            differentiate the model, a kernel of its own without a backward pass, say.
    """
    squares = _Squares(model)
    batches = list(tokens.split(batch_size))
    calls = RecordedCalls(model, batches)
    parts = [batches] if model.streams else [[batch] for batch in batches]  # of a streamed model, read layers once
    step = begin("gradients", 2 * len(parts) * len(model.layers))
    for part in parts:
        entering = _forward(model, calls, part, record, step)
        with _differentiable("What follows the decoder layers"):
            slopes = [_loss_slope(model, ids, hidden) for ids, hidden in zip(part, entering.pop(), strict=True)]
        for number, layer in reversed(list(enumerate(model.layers))):
            with _differentiable(layer.name):
                slopes = _backward(model, layer, calls.of(number), entering.pop(), slopes, squares)
            step(layer.name)
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


@torch.no_grad()
def _forward(
    model: HuggingFaceModel, calls: RecordedCalls, batches: Sequence[Tensor], record: Callable[[], Recorded], step: Step
) -> list[Recorded]:
    """What enters each layer, and last what leaves the last one."""
    entering = [record()]
    for batch in batches:
        entering[0].append(model.first_inputs(batch))
    for number, layer in enumerate(model.layers):
        entering.append(record())
        with model.resident(layer):
            for hidden in entering[-2]:
                entering[-1].append(calls.of(number)(hidden)(layer.module, hidden))
        step(layer.name)
    return entering


@torch.enable_grad()
def _loss_slope(model: HuggingFaceModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """d loss / d hidden, from the logits of a few positions at a time."""
    hidden = hidden.detach().requires_grad_()
    slope = torch.zeros_like(hidden)
    for positions in model.pieces(ids):
        logits = model.logits(ids, hidden, positions).float()
        labels = ids[:, positions.to(ids.device) + 1].to(logits.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        slope += torch.autograd.grad(loss, hidden)[0]
    return slope


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


@torch.enable_grad()
def _backward(
    model: HuggingFaceModel,
    layer: DecoderLayer,
    calls: Calls,
    entering: Sequence[Tensor],
    slopes: Sequence[Tensor],
    squares: _Squares,
) -> list[Tensor]:
    """The slopes of what enters a layer, from those of what leaves it; those of its operators are squared and added."""
    before: list[Tensor] = []
    with model.resident(layer), ExitStack() as hooks:
        experts: dict[str, FusedExperts] = {}
        for path, module in layer.module.named_modules():
            name = f"{layer.name}.{path}".removesuffix(".")
            if isinstance(module, LINEAR_MODULES) and name in squares.sums:
                hooks.enter_context(module.register_forward_hook(partial(squares.watch, name)))
            elif fused_parameters(module):
                experts[name] = FusedExperts(module)
                hooks.enter_context(experts[name].looped())
        for hidden, slope in zip(entering, slopes, strict=True):
            hidden = hidden.detach().requires_grad_()
            output = calls(hidden)(layer.module, hidden)
            with ExitStack() as heard:
                for name, pile in experts.items():
                    heard.enter_context(pile.hooked_backward(partial(squares.hear, name)))
                before.append(torch.autograd.grad(output, hidden, slope)[0])
            squares.require_all()
    return before
