"""Text written by the model: calibration without any data, network or licence."""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from convexprune._device.precision import widened
from convexprune._progress import Step, begin
from convexprune.errors import CalibrationError

from .._huggingface import HuggingFaceModel
from .documents import Split

SampleSplit = Split | Literal["held-out"]

BATCH_TOKENS = (
    16384  # sampled side by side; a constant, because the batch decides which sample gets which random number
)


def sampled_windows(model: HuggingFaceModel, *, num_samples: int, length: int, seed: int, split: SampleSplit) -> Tensor:
    """Draw windows [num_samples length] from the model's distribution.

    Plain ancestral sampling: temperature 1, nothing cut off, and the end of a text is an ordinary token, after which
    the model goes on as in training. Reproducible for a seed on a machine; the splits never share random numbers,
    whatever their seeds.
    """
    if length < 2:
        raise CalibrationError(f"A sampled window starts from one given token, so it needs 2 or more; got {length}.")
    random_seed = {"calibration": 2 * seed, "evaluation": 2 * seed + 1, "held-out": -1 - seed}[split]
    device = model.device
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=kind):
        torch.manual_seed(random_seed)
        start = _first_token(model)
        rows = max(1, BATCH_TOKENS // length)
        sizes = [min(rows, num_samples - done) for done in range(0, num_samples, rows)]
        step = begin(f"writing {num_samples:,} samples of text for {split}", len(sizes) * (length - 1))
        return torch.cat([_sample(model, start, size, length, step) for size in sizes])


def _sample(model: HuggingFaceModel, start: int, rows: int, length: int, step: Step) -> Tensor:
    inner: Any = model.model  # typed, transformers says of none of its own models that it can generate
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        pad_token_id=start,  # never used, but asked for
    )
    prompt = torch.full((rows, 1), start, device=model.device)

    def report(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Report progress: transformers calls a stopping criterion once per token. Never stop."""
        step("")
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    # What a generation config leaves open is filled from the model's own: penalties, suppressed tokens, its end token.
    own, inner.generation_config = inner.generation_config, config
    try:
        given: dict[str, Any] = {"generation_config": config, "stopping_criteria": StoppingCriteriaList([report])}
        with widened(model.device, inner.dtype, rows):
            return inner.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **given).cpu()
    finally:
        inner.generation_config = own


def _first_token(model: HuggingFaceModel) -> int:
    """Return the token that starts a text, else the token that ends a text, else a random token, by the seed."""
    for token in (model.model.config.bos_token_id, model.model.config.eos_token_id):
        if isinstance(token, list):
            token = token[0]
        if token is not None and 0 <= token < model.vocab_size:
            return token
    return int(torch.randint(model.vocab_size, ()))
