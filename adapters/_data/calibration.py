"""Calibration tokens: whatever the user has, as disjoint windows of token ids, with nothing cut off in silence."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convexprune._progress import begin
from convexprune.errors import CalibrationError
from convexprune.recipe import Recipe

from .._discovery.family import positions, vocabulary
from .._huggingface import HuggingFaceModel
from .documents import TEXT_FILES, Documents, Split, read_documents
from .rows import ACCEPTED, ids_as_tensor, read_rows, refuse_uninformative
from .sampling import sampled_windows
from .sources import Part, apportioned, documents_of, interleaved, parts_of

DEFAULT_LENGTH = 2048
EVALUATION_WINDOW = 1024
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8)
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer makes of prose, so a large corpus is read only as far as needed


def calibration_and_held_out(
    dataset: Any,
    model: HuggingFaceModel,
    *,
    num_samples: int | None,
    max_seq_length: int | None,
    seed: int,
    spare: int = 0,
    split: Split = "calibration",
) -> tuple[Tensor, Tensor]:
    """Return token ids for calibration or evaluation, and disjoint windows from the rest of the data set.

    Text is joined, tokenised once and cut into disjoint windows; a rest shorter than a window is dropped. If there are
    more windows than requested, a permutation drawn from the seed chooses: the two splits choose from its two ends, so
    that with a common data set and seed they stay apart while there are windows for both. Rows of token ids are taken
    row by row. The ids are [num_samples length] and [up to spare, length], int64, on the CPU. Without `num_samples`
    all windows are taken; without `max_seq_length` the rows' length, or for text a sensible one (`window_length`).
    """
    _check_request(num_samples, max_seq_length, model)
    if len(parts := parts_of(dataset)) > 1:
        return _mixed(parts, model, num_samples, spare, max_seq_length=max_seq_length, seed=seed, split=split)
    dataset, length = parts[0][0], window_length(model, max_seq_length)
    if isinstance(dataset, str) and dataset == "self":
        if num_samples is None:
            raise CalibrationError('dataset="self" has no end: say how many samples, num_samples=128 for example.')
        calibration = sampled_windows(model, num_samples=num_samples, length=length, seed=seed, split=split)
        refuse_uninformative(calibration)
        if spare == 0:
            return calibration, calibration[:0]
        return calibration, sampled_windows(model, num_samples=spare, length=length, seed=seed, split="held-out")
    wanted = None if num_samples is None else num_samples + spare
    windows = _valid(_windows(dataset, model, wanted, max_seq_length, length, split), model.model, model.name)
    name = str(dataset) if isinstance(dataset, str | Path) else f"a value of type {type(dataset).__name__}"
    chosen, left = _choose(windows, num_samples, spare, seed, split, name)
    refuse_uninformative(chosen)
    return chosen, left


def _mixed(
    parts: Sequence[Part], model: HuggingFaceModel, num_samples: int | None, spare: int, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Return windows to calibrate on and windows held out, of each part by its share."""
    if num_samples is None:
        raise CalibrationError("A data set of several parts: say how many samples, num_samples=128 for example.")
    counts, spares = apportioned(num_samples, parts), apportioned(spare, parts)
    if 0 in counts:
        raise CalibrationError(f"Of {num_samples} samples, {parts[counts.index(0)][0]} gives none. Ask for more.")
    each = [
        calibration_and_held_out(name, model, num_samples=count, spare=left, **settings)
        for (name, _), count, left in zip(parts, counts, spares, strict=True)
    ]
    return interleaved([fitted for fitted, _ in each]), interleaved([left for _, left in each])


def window_length(model: HuggingFaceModel, max_seq_length: int | None) -> int:
    """Return the tokens of a window of text: by default the shorter of 2048 and the model's limit."""
    return max_seq_length or min(DEFAULT_LENGTH, model.max_positions)


def recipe_windows(dataset: Any, model: HuggingFaceModel, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the windows that a recipe asks for, to fit and held out, both [windows length]."""
    tokens, held_out = calibration_and_held_out(
        dataset,
        model,
        num_samples=recipe.num_calibration_samples,
        spare=recipe.spare_samples,
        max_seq_length=recipe.max_seq_length,
        seed=recipe.seed,
    )
    if len(held_out) < (recipe.held_out_samples or 0):
        raise CalibrationError(
            f"The data set has {len(held_out)} windows left after {len(tokens)} for calibration; "
            f"held_out_samples={recipe.held_out_samples} were asked for. Ask for fewer, or leave it out."
        )
    return tokens, held_out


def text_windows(
    text: str | Path, model: HuggingFaceModel, window: int | None = None, name: str | None = None
) -> Tensor:
    """Return all disjoint windows [windows window] of a text, in order, for evaluation; a shorter rest is dropped.

    The text may be a path to a .txt or .jsonl file: a `Path`, or a line that ends like one. By default a window is the
    shorter of 1024 tokens and the model's limit. Errors call the text by `name`.
    """
    window = min(EVALUATION_WINDOW, model.max_positions) if window is None else window
    _check_request(None, window, model)
    is_path = isinstance(text, Path) or ("\n" not in text and text.endswith(TEXT_FILES))
    windows = _cut(_tokenise(read_documents(Path(text)) if is_path else Documents([str(text)]), model), window)
    windows = _valid(windows, model.model, model.name)
    return _choose(windows, None, 0, 0, "evaluation", name or (str(text) if is_path else "the text given"))[0]


def to_predict(windows: Any, model: PreTrainedModel, name: str) -> Tensor:
    """Return windows [windows window] to evaluate on as int64 on the CPU, if the model can read and predict them."""
    got = list(windows.shape) if isinstance(windows, Tensor) else f"a value of type {type(windows).__name__}"
    if not isinstance(windows, Tensor) or windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise CalibrationError(
            f"Perplexity needs windows of 2 or more tokens as a tensor of ids [windows window]; got {got}."
        )
    return _valid(windows, model, name)


def _windows(
    dataset: Any,
    model: HuggingFaceModel,
    num_samples: int | None,
    max_seq_length: int | None,
    length: int,
    split: Split,
) -> Tensor:
    """Return all windows of a data set, or as many as are sure to be enough."""
    dataset = ids_as_tensor(dataset) if hasattr(dataset, "__array__") else dataset  # NumPy's
    match dataset:
        case str() | Path():
            characters = None if num_samples is None else num_samples * length * CHARACTERS_PER_TOKEN
            return _cut(_tokenise(documents_of(dataset, split, characters), model), length)
        case list() | tuple() if dataset and all(isinstance(item, str) for item in dataset):
            return _cut(_tokenise(Documents(dataset), model), length)
        case list() | tuple() if dataset and all(isinstance(item, Mapping) and "messages" in item for item in dataset):
            return _cut(_tokenise(Documents([item["messages"] for item in dataset]), model), length)
        case Tensor() if dataset.dim() == 1:
            return _cut(dataset, length)
        case Tensor() | Mapping():
            return read_rows([dataset], None, max_seq_length)
        case Iterable():
            limit = None if isinstance(dataset, list | tuple) else num_samples
            return read_rows(dataset, limit, max_seq_length)
    raise CalibrationError(f"A data set of type {type(dataset).__name__} cannot calibrate. Accepted: {ACCEPTED}.")


def _check_request(num_samples: int | None, length: int | None, model: HuggingFaceModel) -> None:
    if num_samples is not None and num_samples < 1:
        raise CalibrationError(f"num_samples={num_samples}: at least 1 is needed.")
    if length is not None and not 1 <= length <= model.max_positions:
        raise CalibrationError(
            f"Windows of {length} tokens: {model.name} can see from 1 to {model.max_positions}. "
            "Leave their length out to have as many as are sensible."
        )


def _tokenise(documents: Documents, model: HuggingFaceModel) -> Tensor:
    """Return all ids [tokens] of a text, begun as the tokenizer begins any text; of conversations as their template."""
    if model.tokenizer is None:
        raise CalibrationError(
            f"{model.name} came without a tokenizer, so it reads no text. Give tokenizer= (in Python), put the "
            "tokenizer's files into the model's folder, or give token ids."
        )
    text, special = documents.text(model.tokenizer)
    begin(f"reading {len(text):,} characters of text")
    # Not verbose: a text longer than the model can see is no mistake here, it is cut into windows next.
    ids = model.tokenizer(text, truncation=False, verbose=False, add_special_tokens=special)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _cut(tokens: Tensor, length: int) -> Tensor:
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def _valid(windows: Tensor, model: PreTrainedModel, name: str) -> Tensor:
    """Return windows as int64 on the CPU, if the model can read them."""
    if windows.dtype not in INTEGERS:
        raise CalibrationError(f"Token ids are integers; got {windows.dtype}. Give what the tokenizer returned.")
    windows, limit, known = windows.to("cpu", torch.int64), positions(model.config), vocabulary(model)
    if windows.shape[1] > limit:
        raise CalibrationError(f"Windows of {windows.shape[1]} tokens; {name} sees {limit} at most. Cut them shorter.")
    if windows.numel() and not 0 <= int(windows.min()) <= int(windows.max()) < known:
        raise CalibrationError(
            f"Token ids from {int(windows.min())} to {int(windows.max())}; {name} knows 0 to {known - 1}. Is it "
            "another model's tokenizer?"
        )
    return windows


def _choose(
    windows: Tensor, num_samples: int | None, spare: int, seed: int, split: Split, name: str
) -> tuple[Tensor, Tensor]:
    count, length = windows.shape
    wanted = max(1, count if num_samples is None else num_samples)
    if count < wanted:
        raise CalibrationError(
            f"The data set for {split}, {name}, holds {count} full windows of {length} tokens; {wanted} were asked "
            "for. Give more text, fewer samples, or shorter windows."
        )
    if count == wanted:
        return windows, windows[:0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = order if split == "calibration" else order.flip(0)
    return windows[order[:wanted]], windows[order[wanted : wanted + spare]]
