"""Token ids in rows: read from tensors, arrays, lists and iterables of these, and refused if uninformative."""

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

from convexprune.errors import CalibrationError, shown

from .documents import CORPORA

ACCEPTED = (
    '"self" (text sampled from the model), '
    f"{', '.join(repr(name) for name in CORPORA)}, another data set of the hub as 'organisation/name', "
    "a path to a .txt or .jsonl file, several with shares ('a.txt:0.5,self:0.5'), a list of texts or of "
    "{'messages': [...]}, token ids as a tensor or array [windows tokens] or [tokens], a list of such, or a DataLoader"
)


def read_rows(dataset: Iterable[Any], limit: int | None, length: int | None) -> Tensor:
    """Read ids [windows length] in rows, `limit` at most, because a loader may be endless."""
    rows: list[Tensor] = []
    for item in dataset:
        ids = _ids(item)
        rows.extend(ids.reshape(-1, ids.shape[-1]) if ids.numel() else [])
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        raise CalibrationError(f"The data set is empty. Accepted: {ACCEPTED}.")
    shortest, longest = min(len(row) for row in rows), max(len(row) for row in rows)
    if not shortest == longest == (length or longest):
        raise CalibrationError(
            f"The rows have {shortest} to {longest} tokens; all need {length or 'the same length'}. "
            "Change max_seq_length, or join them into one tensor [tokens] to be cut."
        )
    return torch.stack(rows[:limit])


def _ids(item: Any) -> Tensor:
    """Return the token ids of a loader's item: a tensor or list, a mapping with "input_ids", a tuple that begins so."""
    if isinstance(item, Mapping):
        mask = ids_as_tensor(item.get("attention_mask"))
        if isinstance(mask, Tensor) and not bool(mask.all()):
            raise CalibrationError("The batches are padded, and padding would be calibrated on. Give full windows.")
        if "input_ids" not in item:
            raise CalibrationError(
                f"A row has {shown(list(item))} and no input_ids. Give rows of token ids, or texts as a list of them."
            )
        item = item["input_ids"]
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], Tensor):
        item = item[0]
    item = ids_as_tensor(item)
    if not isinstance(item, Tensor) or item.dim() not in (1, 2):
        raise CalibrationError(
            f"Token ids cannot be read from a value of type {type(item).__name__}. Accepted: {ACCEPTED}."
        )
    return item


def ids_as_tensor(ids: Any) -> Any:
    """Return token ids of NumPy or in a list as a tensor."""
    if not hasattr(ids, "__array__") and not (isinstance(ids, list) and ids and isinstance(ids[0], int | list)):
        return ids
    try:
        return torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):  # of texts, or ragged
        return ids


RUN = 8  # tokens; running text hardly ever repeats so many, one word over and over does nothing else
MIN_DIFFERENT_RUNS = 8  # different runs; fewer are one sentence at most


def refuse_uninformative(windows: Tensor) -> None:
    """Refuse windows of the same few tokens, repeated: a word, a character, padding."""
    different, runs = _runs(windows)
    tokens = windows.unique().numel()
    if tokens == 1 or (different < MIN_DIFFERENT_RUNS and runs >= MIN_DIFFERENT_RUNS * different):
        raise CalibrationError(
            f"The data set says nothing to calibrate on: {tokens} different tokens in {windows.numel():,}, a word or a "
            "character over and over. Give running text."
        )


def shortage(windows: Tensor, widest: int) -> str | None:
    """Return a warning about fewer calibration tokens, without repetitions, than inputs of an operator, if any."""
    different, runs = _runs(windows)
    tokens, part = windows.numel(), different / max(1, runs)
    if tokens * part >= widest:
        return None
    samples = f"num_calibration_samples (--nsamples) of {ceil(widest / part / windows.shape[1]):,} at least"
    repeated = part < 0.5
    return (
        f"{tokens:,} calibration tokens{f', {part:.0%} of them not repeated,' if repeated else ''} for operators "
        f"of up to {widest:,} inputs: weights can fit a sample of fewer tokens exactly, so its errors say little. Give "
        f"{'a text that repeats itself less' if repeated else samples}, and judge by the held-out error."
    )


def _runs(windows: Tensor) -> tuple[int, int]:
    """Return the number of different runs of tokens, and the number of all runs."""
    run = min(RUN, windows.shape[1])
    starts = windows.shape[1] - run + 1
    hashed = torch.zeros_like(windows[:, :starts])
    for i in range(run):
        hashed = hashed * 1_000_003 + windows[:, i : i + starts]  # modulo 2^64
    return hashed.unique().numel(), hashed.numel()
