from .calibration import calibration_and_held_out, calibration_tokens, text_windows
from .checkpoint import EMBEDDED, load, save
from .family import TESTED
from .huggingface import HuggingFaceModel

__all__ = [
    "EMBEDDED",
    "TESTED",
    "HuggingFaceModel",
    "calibration_and_held_out",
    "calibration_tokens",
    "load",
    "save",
    "text_windows",
]
