"""Matrices piled up in one parameter, as the experts of transformers 5: what reaches each, seen as it is multiplied."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Slice:
    """Matrix number `index` of the pile `parameter`."""

    parameter: str
    index: int


@dataclass(frozen=True, eq=False)
class Product:
    """x' = W x for the inputs x [tokens n]; `transposed` if the pile holds W' [n m]."""

    slice: Slice
    inputs: Tensor
    transposed: bool


Hear = Callable[[Product], Callable[[Tensor], Tensor] | None]
"""Hears of a product; what it returns, if anything, is applied to the outputs."""


@dataclass(frozen=True, eq=False)
class Pile:
    """A module that holds piles of matrices [number rows columns], and who listens to its products.

    One for all taps of the module, so that a forward pass is watched once, however many experts there are. The key
    None is for those who hear of every product.
    """

    module: nn.Module
    listeners: dict[Slice | None, list[Hear]] = field(default_factory=dict)

    @contextmanager
    def listen(self, hear: Hear, to: Slice | None = None) -> Iterator[None]:
        """Tell `hear` of the products in this context."""
        with ExitStack() as cleaning:
            if not self.listeners:
                self._watch(cleaning)
            hearers = self.listeners.setdefault(to, [])
            hearers.append(hear)
            try:
                yield
            finally:
                hearers.remove(hear)
                if not hearers:
                    del self.listeners[to]

    @contextmanager
    def looped(self) -> Iterator[None]:
        """In this context every forward pass of the module is a plain loop over experts."""
        config = getattr(self.module, "config", None)
        own = getattr(config, "_experts_implementation", None)
        with ExitStack() as cleaning:
            if config is not None and own is not None:
                # The fast implementations multiply sorted tokens with all experts at once, in one kernel.
                cleaning.callback(setattr, config, "_experts_implementation", own)
                config._experts_implementation = "eager"
            # The GPT-OSS of transformers 4 sends all tokens to all experts on a GPU, unless it is trained.
            cleaning.callback(setattr, self.module, "training", self.module.training)
            self.module.training = True
            yield

    @contextmanager
    def listen_backward(self, hear: Callable[[Product], None]) -> Iterator[None]:
        """Tell `hear` of the products of a backward pass in this context, of a forward pass that was `looped`.

        Their inputs [tokens m] are the gradients at the outputs of the products before.
        """
        with _Products(Pile(self.module, {None: [hear]})):
            yield

    def _watch(self, cleaning: ExitStack) -> None:
        """Make every forward pass of the module a plain loop over experts, and watch its products."""
        cleaning.enter_context(self.looped())
        modes: list[_Products] = []

        def enter(*_: Any) -> None:
            modes.append(_Products(self))
            modes[-1].__enter__()

        def leave(*_: Any) -> None:
            modes.pop().__exit__(None, None, None)

        cleaning.callback(self.module.register_forward_pre_hook(enter).remove)
        cleaning.callback(self.module.register_forward_hook(leave, always_call=True).remove)


@dataclass(frozen=True, eq=False)
class SliceInput:
    """The tap of one matrix of a pile."""

    pile: Pile
    slice: Slice

    @property
    def module(self) -> nn.Module:
        """Where it listens."""
        return self.pile.module

    @contextmanager
    def __call__(self, tell: Callable[[Tensor], None]) -> Iterator[None]:
        """Inside this context, tell(inputs [tokens n]) hears what reaches the matrix."""
        with self.pile.listen(lambda product: tell(product.inputs), self.slice):
            yield


class _Products(TorchDispatchMode):
    """Finds the products with slices of a pile among all that torch computes."""

    def __init__(self, pile: Pile) -> None:
        TorchDispatchMode.__init__(self)
        self.pile = pile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = None
        if func is torch.ops.aten.mm.default:
            product = self._product(args[0], args[1])
        elif func is torch.ops.aten.addmm.default:
            product = self._product(args[1], args[2])
        replies = []
        if product is not None:
            for key in (None, product.slice):
                replies += [hear(product) for hear in self.pile.listeners.get(key, ())]
        output = func(*args, **(kwargs or {}))
        for change in replies:
            output = output if change is None else change(output)
        return output

    def _product(self, x: Tensor, matrix: Tensor) -> Product | None:
        """X [tokens n] times `matrix` [n m], if that is a slice of a pile and there is a token."""
        for name, whole in piles(self.pile.module).items():
            index, within = divmod(matrix.data_ptr() - whole.data_ptr(), whole[0].nbytes)
            if not within and 0 <= index < len(whole) and matrix.numel() == whole[0].numel() and len(x):
                # A row [n] of W is contiguous as stored; if the weights of an output are not, it is W' that is stored.
                return Product(Slice(name, index), x, transposed=matrix.stride(0) != 1)
        return None


def piles(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the module itself that are piles of matrices."""
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return {}  # a kernel
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.dim() == 3 and p.is_floating_point() and min(p.shape) > 1}
