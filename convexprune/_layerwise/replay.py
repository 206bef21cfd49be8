"""Submodules that need not run again: a linear map inside is replayed on known inputs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from convexprune._layerwise.model import DecoderLayer, Group, ModuleInput, computing


@dataclass(frozen=True, eq=False)
class CachedSubmodule:
    """`module` returns the very tensor that `linear` inside returns, alone or in a tuple with `beside` after it.

    So later operators do not run attention again, once the inputs of its output projection are known.
    """

    module: nn.Module
    linear: nn.Module
    beside: tuple[None, ...] | None

    @contextmanager
    def replayed(self, x: Tensor) -> Iterator[None]:
        """Run only the linear map, with its current weight, on its inputs x [samples tokens n] during the context."""

        def forward(*_: Any, **__: Any) -> Any:
            y = self.linear(x)
            return y if self.beside is None else (y, *self.beside)

        with computing(self.module, forward):
            yield


@contextmanager
def replaying(cached: Mapping[CachedSubmodule, Tensor]) -> Iterator[None]:
    """Replay submodules on their inputs during the context."""
    with ExitStack() as stack:
        for cached_submodule, x in cached.items():
            stack.enter_context(cached_submodule.replayed(x))
        yield


@contextmanager
def find_cached_submodules(layer: DecoderLayer, samples: int, found: dict[Group, CachedSubmodule]) -> Iterator[None]:
    """Find cached submodules during a pass of the dense layer with `samples` windows, and fill `found` afterwards.

    No architecture is assumed: the output of the module has to be the output of the linear map, as an object and
    unwritten, and both have to be called once. The outermost such module is taken.
    """
    looks = {group: _Look(linear, around, samples) for group, linear, around in _candidates(layer)}
    with ExitStack() as hooks:
        for look in looks.values():
            hooks.callback(look.linear.register_forward_hook(look.at_linear).remove)
            for module in look.around:
                hooks.callback(module.register_forward_hook(look.at_module).remove)
        yield
    for group, look in looks.items():
        for outermost in look.cached()[:1]:
            found[group] = outermost


def _candidates(layer: DecoderLayer) -> Iterator[tuple[Group, nn.Module, list[nn.Module]]]:
    """Yield groups that are a linear map of all tokens, the map, and the modules around it, the outermost first.

    Modules with the hook of a later stage's group are left out: a shortcut would skip the hook.
    """
    parts = {module: set(module.modules()) for module in layer.module.modules()}
    for number, stage in enumerate(layer.stages[:-1]):
        later = {group.input_hook.module for after in layer.stages[number + 1 :] for group in after}
        for group in stage:
            if group.token_aligned and len(group.operators) == 1 and isinstance(group.input_hook, ModuleInput):
                linear = group.input_hook.module
                around = [m for m, inside in parts.items() if linear in inside and not later & inside]
                yield group, linear, [m for m in around if m not in (layer.module, linear)]


@dataclass(eq=False)
class _Look:
    """Observations of a linear map and of the modules around it; `ends` are modules that return the map's output."""

    linear: nn.Module
    around: list[nn.Module]
    samples: int
    times: Counter[nn.Module] = field(default_factory=Counter)
    ends: dict[nn.Module, tuple[None, ...] | None] = field(default_factory=dict)
    output: Tensor | None = None
    version: int = 0

    def at_linear(self, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Require inputs in the form of the record, [samples tokens n] in a single piece."""
        self.times[linear] += 1
        x = args[0]
        if x.dim() == 3 and len(x) == self.samples and x.is_contiguous():
            self.output, self.version = output, output._version

    def at_module(self, module: nn.Module, _: Any, output: Any) -> None:
        """Note a module whose output is the map's, with nothing beside that a shortcut could not give."""
        self.times[module] += 1
        first, *others = output if type(output) is tuple and output else (output,)
        same = isinstance(first, Tensor) and first is self.output and first._version == self.version
        if same and all(other is None for other in others):
            self.ends[module] = tuple(None for _ in others) if type(output) is tuple else None

    def cached(self) -> list[CachedSubmodule]:
        """All that there are, the outermost first."""
        once = [m for m in self.around if m in self.ends and self.times[m] == self.times[self.linear] == 1]
        return [CachedSubmodule(module, self.linear, self.ends[module]) for module in once]
