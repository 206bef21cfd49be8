from convexprune.settings import BUNDLED

from .calibration import (
    calibration_and_held_out,
    calibration_tokens,
    check_dataset,
    recipe_windows,
    text_windows,
    window_length,
)
from .checkpoint import EMBEDDED, EMBEDDED_WINDOW, bundled_if_none, load, reopen, save, save_from_store
from .family import TESTED
from .huggingface import HuggingFaceModel
from .reading import given_tokenizer

__all__ = [
    "BUNDLED",
    "EMBEDDED",
    "EMBEDDED_WINDOW",
    "TESTED",
    "HuggingFaceModel",
    "bundled_if_none",
    "calibration_and_held_out",
    "calibration_tokens",
    "check_dataset",
    "given_tokenizer",
    "load",
    "recipe_windows",
    "reopen",
    "save",
    "save_from_store",
    "text_windows",
    "window_length",
]
