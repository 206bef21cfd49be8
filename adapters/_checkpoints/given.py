"""The state of a caller's model, noted before a run and restored afterwards."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from convexprune.errors import ModelError

_lock = threading.Lock()
_users: dict[int, list[int]] = {}  # by the model: its thread, once for each use inside of another


@contextmanager
def used_alone(model: nn.Module) -> Iterator[None]:
    """Refuse a model that another thread uses: two runs would disturb each other's hooks and weights."""
    thread = threading.get_ident()
    with _lock:
        users = _users.setdefault(id(model), [])
        if users and users[0] != thread:
            raise ModelError(
                f"This {type(model).__name__} is in use by another thread of this process. Give each thread a model of "
                "its own (copy.deepcopy), or wait."
            )
        users.append(thread)
    try:
        yield
    finally:
        with _lock:
            users.pop()
            if not users:
                del _users[id(model)]


class OriginalState:
    """The state of a `model` before a run: modes of modules, parameters that ask for gradients, changed `layers`.

    Compiled modules run as they are written until then, because compiled ones call no hooks. Layers are copied to
    the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self._training = [module for module in model.modules() if module.training]
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.layers: dict[str, dict[str, Tensor]] = {}
        self._compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
        for module in self._compiled:
            module._compiled_call_impl = None

    def keep(self, name: str, state: Mapping[str, Tensor]) -> None:
        if name not in self.layers:
            self.layers[name] = {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}

    def restore(self) -> None:
        """Restore modes, compiled modules, and parameters that ask for gradients; no layer is kept any longer."""
        self.layers = {}
        for module, compiled in self._compiled.items():
            module._compiled_call_impl = compiled
        for module in self._training:
            module.training = True
        for parameter in self._learning:
            parameter.requires_grad_()
