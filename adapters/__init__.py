from .calibration import calibration_and_held_out, calibration_tokens, text_windows
from .checkpoint import EMBEDDED, load, save, save_from_store
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
    "save_from_store",
    "text_windows",
]
