"""Experts fused into a parameter, as in transformers 5: inputs by expert, observed at the multiplication."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ExpertIndex = tuple[str, int]
"""An expert: the name of a fused parameter, and the number of a matrix in the parameter."""


@dataclass(frozen=True, eq=False)
class Product:
    """The product W x of an expert with `inputs` x [tokens n]; `transposed` if the parameter stores W' [n m]."""

    expert: ExpertIndex
    inputs: Tensor
    transposed: bool


MatmulHook = Callable[[Product], Callable[[Tensor], Tensor] | None]
"""Called with each product; the function it returns, if any, is applied to the outputs."""


@dataclass(frozen=True, eq=False)
class FusedExperts:
    """A `module` with fused experts, parameters [number rows columns], and the `hooks` on their products.

    All hooks of a module share an object, so that a forward pass is observed once, however many experts there are.
    Hooks under the key None are called with every product.
    """

    module: nn.Module
    hooks: dict[ExpertIndex | None, list[MatmulHook]] = field(default_factory=dict)

    @contextmanager
    def hooked(self, hook: MatmulHook, expert: ExpertIndex | None = None) -> Iterator[None]:
        """Call `hook` with the products of an expert, or of all, in this context."""
        with ExitStack() as cleaning:
            if not self.hooks:
                cleaning.enter_context(self.looped())
                self._run_inside(_Products, cleaning)
            hooks = self.hooks.setdefault(expert, [])
            hooks.append(hook)
            try:
                yield
            finally:
                hooks.remove(hook)
                if not hooks:
                    del self.hooks[expert]

    @contextmanager
    def looped(self) -> Iterator[None]:
        """Turn forward passes of the module into a plain loop over its experts during the context."""
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
            self._run_inside(_OneByOne, cleaning)
            yield

    @contextmanager
    def hooked_backward(self, hook: Callable[[Product], None]) -> Iterator[None]:
        """Call `hook` with the products of a `looped` backward pass: inputs [tokens m] are gradients of outputs."""
        with _Products(FusedExperts(self.module, {None: [hook]})):
            yield

    def _run_inside(self, mode: Callable[["FusedExperts"], AbstractContextManager[Any]], cleaning: ExitStack) -> None:
        modes: list[AbstractContextManager[Any]] = []

        def enter(*_: Any) -> None:
            modes.append(mode(self))
            modes[-1].__enter__()

        def leave(*_: Any) -> None:
            modes.pop().__exit__(None, None, None)

        cleaning.callback(self.module.register_forward_pre_hook(enter).remove)
        cleaning.callback(self.module.register_forward_hook(leave, always_call=True).remove)


@dataclass(frozen=True, eq=False)
class ExpertInput:
    """The input hook of an expert of fused `experts`."""

    experts: FusedExperts
    expert: ExpertIndex

    @property
    def module(self) -> nn.Module:
        return self.experts.module

    @contextmanager
    def __call__(self, heard: Callable[[Tensor], None]) -> Iterator[None]:
        with self.experts.hooked(lambda product: heard(product.inputs), self.expert):
            yield


class _OneByOne(TorchFunctionMode):
    """Multiply experts in turn on their tokens; Llama 4 calls `torch.bmm` for all, with zeros for others' tokens."""

    def __init__(self, experts: FusedExperts) -> None:
        super().__init__()
        self.experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        piles = fused_parameters(self.experts.module).values()
        if func in (torch.bmm, Tensor.bmm) and any(args[1] is pile for pile in piles):
            return torch.stack([self._multiplied(x, matrix) for x, matrix in zip(*args, strict=True)])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _multiplied(x: Tensor, matrix: Tensor) -> Tensor:
        """X [tokens n] times `matrix` [n m]."""
        own = x.detach().any(-1).nonzero()[:, 0]
        return x.new_zeros(len(x), matrix.shape[1]).index_copy(0, own, x[own] @ matrix)


class _Products(TorchDispatchMode):
    """Finds the products with fused experts among all that torch computes."""

    def __init__(self, experts: FusedExperts) -> None:
        TorchDispatchMode.__init__(self)
        self.experts = experts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = None
        if func is torch.ops.aten.mm.default:
            product = self._product(args[0], args[1])
        elif func is torch.ops.aten.addmm.default:
            product = self._product(args[1], args[2])
        replies = []
        if product is not None:
            for key in (None, product.expert):
                replies += [hook(product) for hook in self.experts.hooks.get(key, ())]
        output = func(*args, **(kwargs or {}))
        for change in replies:
            output = output if change is None else change(output)
        return output

    def _product(self, x: Tensor, matrix: Tensor) -> Product | None:
        """X [tokens n] times `matrix` [n m], if that is a fused expert and there is a token."""
        for name, whole in fused_parameters(self.experts.module).items():
            index, within = divmod(matrix.data_ptr() - whole.data_ptr(), whole.stride(0) * whole.element_size())
            if not within and 0 <= index < len(whole) and matrix.numel() == whole[0].numel() and len(x):
                # A row [n] of W is contiguous as stored; if the weights of an output are not, it is W' that is stored.
                return Product((name, index), x, transposed=matrix.stride(0) != 1)
        return None


def fused_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a `module`, by name, that hold several matrices [number rows columns]."""
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return {}  # a kernel
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.dim() == 3 and p.is_floating_point() and min(p.shape) > 1}
