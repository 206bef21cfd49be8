"""A caller's model in the hands of a run: what is noted of it before, and how it is given back."""

from collections.abc import Mapping

from torch import Tensor, nn


class OriginalState:
    """The state of a `model` before a run: modes of modules, parameters that ask for gradients, layers before they
    changed.

    `layers` are copies in the memory of the CPU, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._training = [module for module in model.modules() if module.training]
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.layers: dict[str, dict[str, Tensor]] = {}

    def keep(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a layer, unless they are kept already."""
        if name not in self.layers:
            self.layers[name] = {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}

    def restore(self) -> None:
        """Modes, and parameters that ask for gradients, as they were; no layer is kept any longer."""
        self.layers = {}
        for module in self._training:
            module.training = True
        for parameter in self._learning:
            parameter.requires_grad_()
