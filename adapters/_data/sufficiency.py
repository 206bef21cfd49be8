"""Check that calibration windows are informative: repetitions, and tokens per input of the widest operator."""

from math import ceil

import torch
from torch import Tensor

from convexprune.errors import CalibrationError

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
    """Return a warning about fewer calibration tokens, without repetitions, than inputs of an operator; None if
    enough.
    """
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
