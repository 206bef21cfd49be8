"""The identity of a run, and differences between two identities."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convexprune._layerwise.settings import LayerSettings
from convexprune._storage.tensors import raw

UNSEEN = ("model", "device", "evaluation")  # of a recipe, in which two runs may differ: compared itself, or no matter


def identity(
    recipe: Mapping[str, Any],
    settings: LayerSettings,
    weights: Mapping[str, str],
    tokens: Mapping[str, Tensor],
    installed: Mapping[str, str],
    **numerics: Any,
) -> dict[str, Any]:
    """Return everything that decides the bits of a result: a run is resumed only if all is the same."""
    installed = dict(installed)
    plain = {name: value for name, value in recipe.items() if name not in UNSEEN}
    pruner = re.sub(r" at 0x[0-9a-f]+", "", repr(settings.pruner))  # a user's solver may show its address
    return {
        "recipe": plain | {"pruner": pruner},
        "weights": dict(weights),
        "tokens": {name: checksum(t) for name, t in tokens.items()},
        "code": installed.pop("code"),
        "numerics": numerics | installed,
    }


def checksum(tensor: Tensor) -> str:
    return hashlib.sha256(raw(tensor)).hexdigest()


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """List the differences between two structures of JSON, as "name: then, now"; for checksums only the name."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        parts = (differences(then.get(k), now.get(k), f"{name}.{k}" if name else k) for k in keys)
        return [line for part in parts for line in part]
    if then == now:
        return []
    if _is_checksum(then) or _is_checksum(now):
        return [f"{name} (missing now)" if now is None else f"{name} (new)" if then is None else name]
    return [f"{name}: {_short(then)} then, {_short(now)} now"]


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
