"""The options that several commands have, with the same words for each."""

import re
from pathlib import Path
from typing import Annotated

import typer

from convexprune.errors import RecipeError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}iB".upper(): 1 << (10 * power) for power, letter in enumerate("KMGT", 1)
}

Model = Annotated[str | None, typer.Argument(help="Folder or hub name. Left out: the small bundled OPT.")]
Quota = Annotated[str, typer.Option(help="Where the share of zeros holds: matrix or row.")]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="How the zeros are spread: uniform, rows, curve, half-curve, owl, skewness. Left out: of convex and "
        "admm rows, if unstructured with --quota matrix; else uniform."
    ),
]
Dataset = Annotated[
    str, typer.Option(help="self, c4, wikitext2, ptb, OWNER/NAME on the hub, or a .txt or .jsonl file.")
]
SAMPLES = ("--num-calibration-samples", "--nsamples")
Samples = Annotated[int, typer.Option(*SAMPLES, help="Samples to fit on.")]
SamplesOrNone = Annotated[int | None, typer.Option(*SAMPLES, help="Samples to fit on. Left out: as prune has them.")]
HeldOut = Annotated[
    int | None, typer.Option(help="Samples more, to judge by and never to fit. Left out: an eighth as many.")
]
Length = Annotated[
    int | None,
    typer.Option(
        "--max-seq-length",
        "--seqlen",
        help="Tokens a sample. Left out: 2048, or the model's limit; 256 for the bundled OPT.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Samples in one forward pass.")]
Seed = Annotated[int, typer.Option(help="Decides which samples are drawn, and what a model writes.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="To prune: a name, its end, re:REGEX; repeat it. Left out: all."),
]
Ignore = Annotated[list[str] | None, typer.Option(help="To leave alone, named the same way; repeat it.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Output = Annotated[Path, typer.Option(help="Folder for the result; must be empty or not there.")]
RemoteCode = Annotated[bool, typer.Option(help="Run code that the checkpoint brings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]


def parse_bytes(text: str) -> int:
    """Bytes from "24GiB", "80 GB" or a plain number.

    Raises:
        RecipeError: it is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise RecipeError(f"Memory {text!r} is no amount of bytes. Write it as 24GiB, 80GB or 512MiB.")
    return round(float(match[1]) * UNITS[match[2].upper()])
