"""A comparison on several calibration samples, which shows the part of chance in a difference."""

from collections.abc import Mapping, Sequence
from math import exp, inf, log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from convexprune._progress.shown import visible
from convexprune._storage.files import write_json
from convexprune._storage.staging import Staging, output_folder
from convexprune.errors import RecipeError
from convexprune.report import finite

from ._compare import SAMPLES, compare, published, resumable
from ._results import (
    NAMES,
    Row,
    accuracy_cell,
    document,
    draw_samples,
    name_cells,
    terminal_table,
    to_perplexity,
    will_draw,
)

SAME = ("name", "method", "pattern", "quota", "allocation", "asked_sparsity", "convention")
"""What the rows of a variant have in common; its zeros may depend on the sample, by a survey or by ties."""
CAPTION = """\
Means over the samples are geometric. *KL / first* is the KL divergence from dense over that of the first variant of the
same pattern and share, on the same sample: geometric mean, and the standard error of its logarithm over the samples.
*layer / first* is the same of the error of the decoder layers' outputs. A difference within two standard errors, or
from so few samples that they are not known well, is no difference."""


@visible
def compare_samples(
    model: str | Path | None,
    seeds: Sequence[int],
    output: Path,
    *,
    resume: bool = False,
    plots: bool | None = None,
    command: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Compare on the calibration samples of several seeds.

    Each sample's comparison is in `output/seed-N`, as `compare` leaves it. Evaluation texts are the same for all. The
    output is there once all samples are.

    Args:
        model: see `compare`.
        seeds: seeds of the choice of calibration windows, at least two. The text should have many more windows than a
            sample: samples with common windows differ too little.
        output: folder for the results; must be empty, unless `resume`.
        resume: go on with interrupted samples, if there are any; finished samples are kept.
        plots: draw plots, with seaborn; None means if seaborn is installed.
        command: the command line to state in the report.
        settings: see `compare`.

    Returns:
        The content of `samples.json`.

    Raises:
        ConvexpruneError: see `compare`; also for repeated seeds, and for other seeds than those of what is resumed.
    """
    if len(set(seeds)) < max(2, len(seeds)):
        raise RecipeError(f"Seeds {', '.join(map(str, seeds))}: give at least two, each once.")
    drawing = will_draw(plots)
    staging = Staging(output_folder(output, model), "compare")
    before = resumable(staging, list(seeds), resume)
    settings |= {"resume": True, "plots": plots, "command": command}
    with published(staging, {"seed": list(seeds)}, before) as is_finished:
        folder = staging.output if is_finished else staging.new
        results = [compare(model, output=folder / f"seed-{seed}", seed=seed, **settings) for seed in seeds]
        card = results[0]["card"] | {"seed": list(seeds), "command": command}
        summary = {"card": card, "dense": results[0]["dense"], "rows": _rows([r["rows"] for r in results])}
        if not is_finished:
            write_json(folder / SAMPLES, finite(summary))
            (folder / "report.md").write_text(markdown(summary, [draw_samples(summary, folder)] if drawing else []))
    return summary


def _rows(samples: Sequence[Sequence[Row]]) -> list[Row]:
    """Return a row for a variant over the samples, with ratios to the first variant of the same pattern and share."""
    targets = [(row["pattern"], row["asked_sparsity"]) for row in samples[0]]
    rows = []
    for number, target in enumerate(targets):
        first = targets.index(target)
        pairs = [(sample[number], sample[first]) for sample in samples]
        texts = {
            text: {
                "perplexity": to_perplexity(fmean(float(row["texts"][text]["nll"]) for row, _ in pairs)),
                "kl": _over_first([[row["texts"][text]["kl"] for row in pair] for pair in pairs]),
            }
            for text in samples[0][number]["texts"]
        }
        layer = _over_first([[row["output_error"]["mean"] for row in pair] for pair in pairs])
        known = {key: samples[0][number][key] for key in SAME}
        known["sparsity"] = fmean(row["sparsity"] for row, _ in pairs)
        scored = [row["accuracy"] for row, _ in pairs]
        known["accuracy"] = None if None in scored else fmean(scored)
        rows.append(known | {"first": samples[0][first]["name"], "texts": texts, "layer": layer})
    return rows


def _over_first(pairs: Sequence[Sequence[float | str | None]]) -> dict[str, float] | None:
    """Return geometric means of a value and its ratio to the first, and the ratio's error; None if one is not known."""
    known = [[float("nan" if value is None else value) for value in pair] for pair in pairs]
    if not all(0 < value < inf for pair in known for value in pair):
        return None
    logs = [log(value / first) for value, first in known]
    mean = exp(fmean(log(value) for value, _ in known))
    return {"mean": mean, "ratio": exp(fmean(logs)), "error": stdev(logs) / len(logs) ** 0.5}


def cells(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    texts = list(summary["dense"]["texts"])
    header = [*NAMES, *(name for text in texts for name in (text, "KL", "KL / first"))]
    header += [*["tasks"] * len(accuracy_cell(summary["dense"])), "layer output", "layer / first"]
    lines = []
    for row in summary["rows"]:
        line = name_cells(row)
        for found in (row["texts"][text] for text in texts):
            line += [f"{found['perplexity']:.2f}", *_of_first(found["kl"], ".4f")]
        lines.append([*line, *accuracy_cell(row), *_of_first(row["layer"], ".2e")])
    return header, lines


def table(summary: Mapping[str, Any]) -> Table:
    title = f"{summary['card']['model']}: {len(summary['rows'])} variants on {len(summary['card']['seed'])} samples"
    return terminal_table(title, *cells(summary))


def markdown(summary: Mapping[str, Any], plots: Sequence[str]) -> str:
    seeds = summary["card"]["seed"]
    each = f"Each sample by itself: {', '.join(f'[seed {s}](seed-{s}/report.md)' for s in seeds)}."
    title = f"methods side by side on {len(seeds)} calibration samples"
    return document(title, cells(summary), [CAPTION, each], plots, summary["card"])


def _of_first(mean: Mapping[str, float] | None, style: str) -> list[str]:
    if mean is None:
        return ["-", "-"]
    return [format(mean["mean"], style), f"{mean['ratio']:.3f} ± {mean['error']:.3f}"]
