"""Models of Hugging Face transformers, as decoder layers with linear operators; and texts to calibrate on."""
# ruff: noqa: F401

from convexprune._schema.settings import BUNDLED

from ._allocating import allocate, allocate_each, token_weights
from ._channels.permuting import Permutation, Permuted, find_permutation
from ._checkpoints.admission import refuse_headless
from ._checkpoints.model_folder import local_folder, refuse_packed, said_of_base
from ._checkpoints.origin import cast_back
from ._checkpoints.reading import given_tokenizer
from ._data.calibration import calibration_and_held_out, recipe_windows, text_windows, to_predict, window_length
from ._data.documents import (
    CORPORA,
    TEXT_FILES,
    answers,
    datasets_package,
    hub_text,
    is_file,
    read_documents,
    read_text,
    split_field,
)
from ._data.likelihood import Likelihood, Logits, by_token, last_states, likelihoods, of_states
from ._data.rows import shortage
from ._data.sources import addressed, check_dataset, needs_sampling, parts_of
from ._discovery.family import TESTED
from ._discovery.operators import LINEAR_MODULES, ParameterOperator
from ._discovery.passes import logits_in_pieces
from ._discovery.selection import matcher, shared_weights, unknown_maps, with_rules
from ._huggingface import HuggingFaceModel
from ._inspection.inspection import Inspection, inspect
from ._inspection.outline import Outline, device_bytes, read_outline, what_needs_less
from ._loading.loading import EMBEDDED, EMBEDDED_WINDOW, bundled_if_none, load, reopen
from ._loading.packed import load as load_packed
from ._removal import find_removal
from ._removal.base import AbstractRemoval
from ._saving import miscounted, pruned_entries, require_written, save, save_from_store, save_permuted
from ._types import TypeChoice, alike, ends, on_grid, require_exportable
