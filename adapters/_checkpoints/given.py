"""A caller's model in the hands of a run: what is noted of it before, and how it is given back."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def beside_the_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str]:
    """What of a loaded model goes into a result beside its weights.

    Args:
        model: has settings of generation, if it generates.
        tokenizer: its tokenizer, if it has one.

    Returns:
        Checksums by name.
    """
    found: dict[str, Any] = {}
    if (settings := getattr(model, "generation_config", None)) is not None:
        found["generation settings"] = settings.to_dict()
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
        of_last_call = ("truncation", "padding")
        found["tokenizer"] = {key: value for key, value in state.items() if key not in of_last_call} | {
            "template": tokenizer.chat_template, "special": tokenizer.special_tokens_map,
        }  # fmt: skip
    texts = {name: json.dumps(each, sort_keys=True, default=str) for name, each in found.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


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
        """Copy the tensors of a layer, unless they are kept already.

        Args:
            name: of the layer.
            state: its tensors by name.
        """
        if name not in self.layers:
            self.layers[name] = {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}

    def restore(self) -> None:
        """Modes, and parameters that ask for gradients, as they were; no layer is kept any longer."""
        self.layers = {}
        for module in self._training:
            module.training = True
        for parameter in self._learning:
            parameter.requires_grad_()
