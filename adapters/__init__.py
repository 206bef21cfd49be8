from .calibration import calibration_and_held_out, calibration_tokens, text_windows
from .checkpoint import EMBEDDED, load, save, save_from_store
from .family import FAMILIES, Family, family_of
from .huggingface import HuggingFaceModel

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "Family",
    "HuggingFaceModel",
    "calibration_and_held_out",
    "calibration_tokens",
    "family_of",
    "load",
    "save",
    "save_from_store",
    "text_windows",
]
