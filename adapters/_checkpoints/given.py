"""The state of a caller's model, noted before a run and restored afterwards."""

from collections.abc import Mapping

from torch import Tensor, nn


class OriginalState:
    """The state of a `model` before a run: modes of modules, parameters with gradients, layers before their change.

    `layers` are copies in the memory of the CPU, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._training = [module for module in model.modules() if module.training]
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.layers: dict[str, dict[str, Tensor]] = {}

    def keep(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a layer, unless copied before."""
        if name not in self.layers:
            self.layers[name] = {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}

    def restore(self) -> None:
        """Restore modes and gradients of parameters, and forget the copies."""
        self.layers = {}
        for module in self._training:
            module.training = True
        for parameter in self._learning:
            parameter.requires_grad_()
