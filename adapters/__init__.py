"""Models of Hugging Face transformers, as decoder layers with linear operators; and texts to calibrate on."""
# ruff: noqa: F401

from convexprune._schema.settings import BUNDLED

from ._checkpoints.reading import given_tokenizer
from ._data.calibration import calibration_and_held_out, recipe_windows, text_windows, window_length
from ._data.sources import check_dataset
from ._discovery.family import TESTED
from ._huggingface import HuggingFaceModel
from ._loading.loading import EMBEDDED, EMBEDDED_WINDOW, bundled_if_none, load, reopen
from ._saving import save, save_from_store
