"""Parts of a model removed for good, and the smaller model: removals by pattern."""

from collections.abc import Callable, Mapping

from convexprune.constraints import Constraint

from .._huggingface import HuggingFaceModel
from .base import AbstractRemoval
from .experts import find_experts
from .heads import find_heads
from .narrowing import find_narrowing
from .shortening import find_shortening

REMOVALS: Mapping[str, Callable[[HuggingFaceModel, Constraint], AbstractRemoval]] = {
    "channels": find_narrowing,
    "heads": find_heads,
    "layers": find_shortening,
    "experts": find_experts,
}


def find_removal(model: HuggingFaceModel, pattern: Constraint) -> AbstractRemoval:
    """Return the removal of a pattern for a dense model."""
    assert pattern.removes is not None
    return REMOVALS[pattern.removes](model, pattern)
