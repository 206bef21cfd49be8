"""Token ids in rows: tensors, arrays, lists, mappings, and iterables of these."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from convexprune.errors import CalibrationError, shown

from .corpora import CORPORA

ACCEPTED = (
    '"self" (text sampled from the model), '
    f"{', '.join(repr(name) for name in CORPORA)}, another data set of the hub as 'organisation/name', "
    "a path to a .txt or .jsonl file, several with shares ('a.txt:0.5,self:0.5'), a list of texts or of "
    "{'messages': [...]}, token ids as a tensor or array [windows tokens] or [tokens], a list of such, or a DataLoader"
)


def read_rows(dataset: Iterable[Any], limit: int | None, length: int | None) -> Tensor:
    """Read ids [windows length] in rows, `limit` at most, because a loader may be endless; None is all, or any
    length.
    """
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
        raise CalibrationError(f"Token ids cannot be read from a {type(item).__name__}. Accepted: {ACCEPTED}.")
    return item


def ids_as_tensor(ids: Any) -> Any:
    """Token ids of NumPy or in a list as a tensor."""
    if not hasattr(ids, "__array__") and not (isinstance(ids, list) and ids and isinstance(ids[0], int | list)):
        return ids
    try:
        return torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):  # of texts, or ragged
        return ids
