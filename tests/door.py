"""What the tests of `prune` on the tiny models share: a few windows, small settings, and a model's weights."""

from typing import Any

import torch
from torch import Tensor

from convexprune.adapters import HuggingFaceModel

TOKENS = torch.randint(2, 4000, (6, 24), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"dataset": TOKENS, "num_calibration_samples": 6, "bound_rows": 0}


def state(model: HuggingFaceModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}
