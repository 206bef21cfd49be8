"""The effect of operators' outputs and inputs on the loss: Fisher estimates on the calibration tokens."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from convexprune._device.memory import lacks_memory
from convexprune._device.precision import widened
from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.context import LayerContext, propagate
from convexprune._layerwise.model import DecoderLayer
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerCalls, LayerWalk
from convexprune._progress import begin
from convexprune.errors import ModelError

from ._discovery.experts import FusedExperts, Product, fused_parameters
from ._discovery.operators import LINEAR_MODULES, Place
from ._huggingface import HuggingFaceModel

WITHOUT = "leave gradients out (allocation='uniform', token_weights='none')"
TOGETHER = 32768  # tokens whose inputs of all layers lie on the disk while a model that streams is differentiated
BACKWARD = 2  # times the forward pass of a layer: that pass again, and the products back; a third for `blocks`


@dataclass(frozen=True, eq=False)
class Fisher:
    """The effect of operators, "layer.operator", on the loss: means over tokens.

    The squared gradients of an expert are summed over the tokens routed to the expert and divided by the number of
    all tokens, so that rare experts count less. `outputs` [m] are (d loss / d y_i)^2: twice the cost of an error of
    size 1 in y_i. `inputs` [n / block] are (sum_{j in b} x_j d loss / d x_j)^2 of blocks b: twice the cost of not
    reading a block. `tokens` [windows length] are |d loss / d y|^2 of operators that all tokens reach. `embedding` [n]
    is (d loss / d x_i)^2 of the inputs of the first layer.
    """

    outputs: dict[str, Tensor]
    inputs: dict[tuple[str, int], Tensor]
    tokens: dict[str, Tensor]
    embedding: Tensor


def loss_fisher(
    model: HuggingFaceModel,
    tokens: Tensor,
    batch_size: int = 1,
    record: Callable[[], Recorded] = list,
    blocks: Collection[tuple[str, int]] = (),
    by_token: bool = False,
) -> Fisher:
    """Return the empirical Fisher information of operators on ids [windows length]; `blocks` and tokens on request.

    The loss is the summed negative log-likelihood of a window (the labels are the text's). It is differentiated by
    layer, from the last to the first, so that a streamed model has a single decoder layer in memory; the inputs of
    layers are recorded meanwhile.
    """
    squares = _Squares(model, blocks, by_token)
    batches = list(tokens.split(batch_size))
    calls = LayerCalls(model, batches)
    together = max(1, TOGETHER // (batch_size * tokens.shape[1])) if model.streams else 1  # which reads layers again
    parts = [batches[first : first + together] for first in range(0, len(batches), together)]
    count, embedding = len(model.layers), torch.zeros((), dtype=torch.float64)
    steps = BACKWARD + bool(blocks)
    on_layer = begin("gradients", (1 + steps) * len(parts) * count)
    for part in parts:
        states = MemoryStore(range(count), record, keep=True)
        LayerWalk(model, part, states, on_layer=on_layer, calls=calls).run(propagate)
        with _differentiable("What follows the decoder layers"), widened(model.device, model.model.dtype):
            gradients = [_loss_gradient(model, ids, x) for ids, x in zip(part, states.take(count), strict=True)]
        backward = _Backward(gradients, squares)
        LayerWalk(model, part, states.backward(), on_layer=partial(on_layer, steps=steps), calls=calls).run(backward)
        embedding = embedding + sum(each.double().square().sum((0, 1)).cpu() for each in backward.gradients)
    for name, total in reversed(squares.sums.items()):  # it is not finite from there back
        if not bool(total.isfinite().all()):
            raise ModelError(
                f"The gradient of the loss at the outputs of {name} is not finite on the calibration tokens. Load the "
                f"model in a wider dtype (dtype='float32'), or {WITHOUT}."
            )
    count = tokens.numel()
    outputs = {name: (total / count).float() for name, total in squares.sums.items()}
    inputs = {key: (total / count).float() for key, total in squares.inputs.items()}
    each_token = {name: torch.cat(each).view(tokens.shape) for name, each in squares.tokens.items()}
    return Fisher(outputs, inputs, each_token, (embedding / count).float())


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
    """The squares of a `Fisher`, summed over tokens."""

    def __init__(self, model: HuggingFaceModel, blocks: Collection[tuple[str, int]], by_token: bool) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=model.device)
        self._operators = {f"{layer.name}.{o.name}": o for layer in model.layers for o in layer.operators}
        self.sums = {name: zeros(operator.shape[0]) for name, operator in self._operators.items()}
        self.inputs = {(name, block): zeros(self._operators[name].shape[1] // block) for name, block in blocks}
        aligned = [(y.name, o.name) for y in model.layers for g in y.groups if g.token_aligned for o in g.operators]
        self.tokens = {f"{layer}.{name}": list[Tensor]() for layer, name in aligned if by_token}
        self._blocks = dict[str, list[int]]()
        for name, block in blocks:
            self._blocks.setdefault(name, []).append(block)
        self._seen = dict[str, Tensor]()  # inputs of experts, until their gradients come
        self.waiting = set[str]()  # operators of the forward pass without a gradient yet

    def reads(self, pile: str) -> bool:
        """Return True if inputs of a stack of experts, by its "layer.path", are requested."""
        return any(name.startswith(f"{pile}.") for name in self._blocks)

    def add(self, name: str, x: Tensor | None, gradient: Tensor) -> None:
        """Count the gradient [... m] at some tokens' outputs, and with their inputs x [... n] the gradient there."""
        gradient = gradient.float().flatten(0, -2)
        self.sums[name] += gradient.square().sum(0, dtype=torch.float64).to(self.sums[name].device)
        if name in self.tokens:
            self.tokens[name].append(gradient.square().sum(1).cpu())
        if x is not None:
            each = (gradient @ self._operators[name].read().float()).mul_(x.float().flatten(0, -2))
            for block in self._blocks[name]:
                total = self.inputs[name, block]
                total += each.unflatten(1, (-1, block)).sum(2).square().sum(0, dtype=torch.float64).to(total.device)
        self.waiting.discard(name)

    def watch(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.waiting.add(name)
        output.register_hook(partial(self.add, name, inputs[0].detach() if name in self._blocks else None))

    def see(self, pile: str, product: Product) -> None:
        """Take a product of a stack of experts, by its "layer.path", in the forward pass."""
        name = Place(pile, *product.expert).name
        if name in self._blocks:
            self._seen[name] = product.inputs.detach()

    def hear(self, pile: str, product: Product) -> None:
        """Take a product of a stack of experts, by its "layer.path", in the backward pass."""
        name = Place(pile, *product.expert).name
        if name in self.sums:
            self.add(name, self._seen.pop(name, None), product.inputs)


class _Backward:
    """The step of a walk back: add squared gradients of operators; `gradients` at outputs become those at inputs."""

    def __init__(self, gradients: list[Tensor], squares: _Squares) -> None:
        self.gradients, self._squares = gradients, squares

    @torch.enable_grad()
    def __call__(self, context: LayerContext) -> None:
        layer = context.layer
        leaving = self.gradients[0]
        with _differentiable(layer.name), widened(leaving.device, leaving.dtype), ExitStack() as hooks:
            experts = self._watch(layer, hooks)
            before = list[Tensor]()
            for entering, gradient in zip(context.inputs["dense"], self.gradients, strict=True):
                hidden = entering.detach().requires_grad_()
                output = context.calls(hidden)(layer.module, hidden)
                with ExitStack() as heard:
                    for name, pile in experts.items():
                        heard.enter_context(pile.hooked_backward(partial(self._squares.hear, name)))
                    before.append(torch.autograd.grad(output, hidden, gradient)[0])
                if waiting := self._squares.waiting:
                    raise RuntimeError(f"no gradient reaches the outputs of {min(waiting)}.")
        self.gradients = before

    def _watch(self, layer: DecoderLayer, hooks: ExitStack) -> dict[str, FusedExperts]:
        """Hook the modules that are operators; fused experts are returned, by "layer.path"."""
        experts = dict[str, FusedExperts]()
        for path, module in layer.module.named_modules():
            name = f"{layer.name}.{path}".removesuffix(".")
            if isinstance(module, LINEAR_MODULES) and name in self._squares.sums:
                hooks.enter_context(module.register_forward_hook(partial(self._squares.watch, name)))
            elif fused_parameters(module):
                experts[name] = FusedExperts(module)
                seen = partial(self._squares.see, name)
                pile = experts[name]
                hooks.enter_context(pile.hooked(seen) if self._squares.reads(name) else pile.looped())
        return experts
