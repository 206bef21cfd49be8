"""The results of a comparison: a row for a variant, as JSON, as tables, and as pictures (seaborn, an extra)."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune.adapters import Likelihood
from convexprune.constraints import parse_pattern
from convexprune.errors import DependencyError, install_hint

from ._variants import Variant

Row = dict[str, Any]

NAMES = ("method", "sparsity", "convention")

CAPTION = """\
Errors are mean |V x* - target|^2 over mean |W x|^2, each under its own convention's target: compare them within a
convention. Without error correction, and for experts, they are over mean |W x*|^2. *held-out* is on tokens that no
method saw. *layer output* compares decoder layers fed with the dense hidden states, median over held-out tokens of |y*
- y|^2 / |y - x|^2: comparable everywhere. *products* [m n] x [n n] are the mean over the groups of operators that share
an input. *solve* are the seconds of the method itself; *all* has its passes through the layer too. *gap* is the largest
relative duality gap of a last solve. *more* is the most memory that was held while the variant pruned, beyond what was
held before. *tasks* is the mean accuracy (acc) over those that have one; `compare.json` has the scores of each, with
standard errors."""


def make_row(variant: Variant, record: Mapping[str, Any], texts: Mapping[str, Mapping[str, Likelihood]]) -> Row:
    records: Sequence[Mapping[str, Any]] = record["layers"]
    operators = [o for record in records for o in record["operators"]]
    return {
        "name": variant.name,
        "method": variant.method,
        "pattern": variant.pattern,
        "quota": variant.quota,
        "allocation": variant.allocation,
        "asked_sparsity": variant.zeros,
        "sparsity": sum(o["zeros"] for o in operators) / sum(o["outputs"] * o["inputs"] for o in operators),
        "convention": variant.convention,
        "error": _summary([o["relative_error"] for o in operators]),
        "held_out_error": _summary([o["held_out_error"] for o in operators]),
        "output_error": _summary([r["output_error"] for r in records]),
        "error_by_layer": [_mean([o["relative_error"] for o in r["operators"]]) for r in records],
        "held_out_error_by_layer": [_mean([o["held_out_error"] for o in r["operators"]]) for r in records],
        "output_error_by_layer": [r["output_error"] for r in records],
        "texts": {
            text: text_result(found[variant.name], found["dense"]) for text, found in texts.items()
        },
        **tasks_result(record["tasks"]),
        "solve_seconds": sum(r["solve_seconds"] for r in records),
        "seconds": sum(r["seconds"] for r in records),
        "products": fmean(r["products"] for r in records),
        "largest_gap": _largest(o["gap"] for o in operators),
        "peak_bytes": _largest(r["peak_bytes"] for r in records),
        "more_bytes": _largest(r["more_bytes"] for r in records),
        "operators": operators,
    }  # fmt: skip


def text_result(found: Likelihood, dense: Likelihood) -> Row:
    """Return perplexity, excess and KL, in all and by window, with the standard error of the differences in nll."""
    nll, differences = fmean(found.nll), [a - b for a, b in zip(found.nll, dense.nll, strict=True)]
    middle, count = fmean(differences), len(differences)
    spread = (sum((d - middle) ** 2 for d in differences) / (count - 1)) ** 0.5 if count > 1 else None
    return {
        "perplexity": to_perplexity(nll),
        "excess": to_perplexity(nll) - to_perplexity(fmean(dense.nll)),
        "kl": fmean(found.kl),
        "nll": nll,
        "difference_error": None if spread is None else spread / count**0.5,
        "nll_by_window": found.nll,
        "kl_by_window": found.kl,
    }


def tasks_result(scores: Sequence[Mapping[str, Any]]) -> Row:
    """Return the scores, and the mean accuracy of all tasks that have one; a group counts in place of its parts."""
    counted = [score["value"] for score in scores if score["metric"] == "acc" and score["part_of"] is None]
    return {"tasks": scores, "accuracy": _mean(counted)}


def table(result: Mapping[str, Any]) -> Table:
    header, lines = cells(result)
    columns = [i for i, name in enumerate(header) if name not in ("median", "+", "more MB", "all s")]
    title = f"{result['card']['model']}: {len(result['rows'])} variants on the same tokens"
    return terminal_table(title, [header[i] for i in columns], [[line[i] for i in columns] for line in lines])


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    texts = list(result["dense"]["texts"])
    header = [*NAMES, *(name for text in texts for name in (text, "+", "KL"))]
    header += ["tasks"] * len(accuracy_cell(result["dense"]))
    header += ["error", "median", "held-out", "median", "layer output"]
    header += ["products", "solve s", "all s", "gap", "more MB"]
    blank = ["-"] * 10
    lines = [["dense", "-", "-", *_text_cells(result["dense"], texts), *accuracy_cell(result["dense"]), *blank]]
    for row in result["rows"]:
        errors = [short(row[key][kind]) for key in ("error", "held_out_error") for kind in ("mean", "median")]
        more = None if row["more_bytes"] is None else row["more_bytes"] / 2**20
        line = [*name_cells(row), *_text_cells(row, texts), *accuracy_cell(row), *errors]
        line += [short(row["output_error"]["mean"])]
        line += [f"{row[key]:.0f}" for key in ("products", "solve_seconds", "seconds")]
        lines.append([*line, short(row["largest_gap"], ".0e"), short(more, ".0f")])
    return header, lines


def markdown(result: Mapping[str, Any], plots: Sequence[str]) -> str:
    shared = ", ".join(f"{seconds:.0f} s {name}" for name, seconds in result["shared_seconds"].items())
    columns = f"Of each text: perplexity, its excess over dense, mean KL divergence from dense in nats. {CAPTION}"
    notes = [columns, f"Shared by all, in no row: {shared}."]
    return document("methods side by side", cells(result), notes, plots, result["card"])


def document(
    title: str, cells: tuple[Sequence[str], Sequence[Sequence[str]]], notes: Sequence[str], plots: Sequence[str],
    card: Mapping[str, Any],
) -> str:  # fmt: skip
    """Return the report: table, meaning of the columns, plots, the command to reproduce, and the conditions."""
    header, lines = cells
    marks = ["---"] * len(NAMES) + ["---:"] * (len(header) - len(NAMES))  # names to the left and numbers to the right
    parts = [
        f"# {card['model']}: {title}",
        "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *lines)),
        *notes,
        *(f"![{name}]({name})" for name in plots),
        f"## Reproduce\n\n```sh\n{card['command']}\n```",
        "\n".join(f"- {key}: {value}" for key, value in _flat(card) if key != "command"),
    ]
    return "\n\n".join(parts) + "\n"


def name_cells(row: Mapping[str, Any]) -> list[str]:
    target = _target(row["pattern"], f"{row['sparsity']:.1%}")
    name = row["method"] if row["allocation"] == "uniform" else f"{row['method']}, {row['allocation']}"
    return [f"{name}, by row" if row["quota"] == "row" else name, target, row["convention"]]


def _target(pattern: str, share: str) -> str:
    if pattern == "unstructured":
        return share
    return pattern if parse_pattern(pattern).describe() == pattern else f"{pattern} {share}"  # 2:4 has a fixed share


def terminal_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]], names: int = len(NAMES)) -> Table:
    """Return a table for a terminal, so many columns of names to the left and numbers to the right."""
    shown = Table(title=title, box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i < names else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    return shown


def _text_cells(row: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
    styles = {"perplexity": ".2f", "excess": ".2f", "kl": ".4f"}
    return [short(row["texts"][text][key], style) for text in texts for key, style in styles.items()]


def accuracy_cell(row: Mapping[str, Any]) -> list[str]:
    """Return the cell of the mean accuracy; none without tasks that have one."""
    return [] if row["accuracy"] is None else [f"{row['accuracy']:.2%}"]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}, {key}" if prefix else str(key))]


def _summary(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {"mean": _mean(known), "median": median(known) if known else None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _largest(values: Iterable[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)


def short(value: float | str | None, style: str = ".2e") -> str:
    return "-" if value is None else format(float(value), style)  # JSON has inf and nan as text


def to_perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood `nll`; infinity where that overflows, or is not a number."""
    return exp(nll) if nll < 700 else float("inf")


LAYER = {
    "error_by_layer": "relative error, calibration tokens",
    "held_out_error_by_layer": "relative error, held-out tokens",
}


def will_draw(plots: bool | None) -> bool:
    """Return True if plots are drawn: by request, or by default if seaborn is installed."""
    there = find_spec("seaborn") is not None
    if plots and not there:
        raise DependencyError(f"Plots need seaborn: {install_hint('plot')}, or ask for none (--no-plots).")
    return there if plots is None else plots


def draw(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw errors by decoder layer and by products, and error, divergence and perplexity by sparsity."""
    rows, texts, plots = result["rows"], list(result["dense"]["texts"]), dict[str, tuple[Any, ...]]()
    for key, label in LAYER.items():
        places = ((row, i, value) for row in rows for i, value in enumerate(row[key]) if value is not None)
        points = [_point(row) | {"layer": i, label: value} for row, i, value in places]
        plots[key.replace("_", "-")] = points, "layer", label, {"col": "target", "errorbar": None}
    means = [row["held_out_error"]["mean"] or row["error"]["mean"] for row in rows]
    pairs = zip(rows, means, strict=True)
    errors = [_point(row) | {"products": 1 + row["products"], "relative error": mean} for row, mean in pairs]
    plots["error-against-products"] = errors, "products", "relative error", {"col": "target", "kind": "scatter"}
    kinds = sorted({point["kind"] for point in errors}, reverse=True)  # lines first, then N:M
    styles = {"style": "kind", "style_order": kinds, "markers": True}
    plots["error-against-sparsity"] = errors, "sparsity", "relative error", styles
    for measure in ("kl", "perplexity"):
        points = [_point(row) | {"text": text, measure: row["texts"][text][measure]} for row in rows for text in texts]
        plots[f"{measure}-against-sparsity"] = points, "sparsity", measure, {"col": "text", **styles}
    return [_lines(folder, name, *plot) for name, plot in plots.items() if plot[0]]  # maybe nothing was held out


def draw_samples(summary: Mapping[str, Any], folder: Path) -> str:
    """Draw the KL divergence over the first variant's on each text, with two standard errors."""
    from matplotlib.figure import Figure

    rows, texts = summary["rows"][::-1], list(summary["dense"]["texts"])
    figure = Figure(figsize=(1 + 5 * len(texts), 1.5 + 0.25 * len(rows)), layout="constrained")
    for axis, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        for place, row in enumerate(rows):
            if (kl := row["texts"][text]["kl"]) is not None:
                reach = exp(2 * kl["error"])
                spread = [[kl["ratio"] * (1 - 1 / reach)], [kl["ratio"] * (reach - 1)]]
                axis.errorbar(kl["ratio"], place, xerr=spread, fmt="o", markersize=3, capsize=2, color="C0")
        axis.axvline(1, color="grey", linewidth=0.5)
        axis.set(title=text, xlabel="KL divergence over the first variant's", xscale="log")
        axis.set_yticks(range(len(rows)), [" ".join(_point(row)[k] for k in ("target", "variant")) for row in rows])
    figure.savefig(folder / "divergence-over-first.png", dpi=120)
    return "divergence-over-first.png"


def _lines(folder: Path, name: str, points: Sequence[Row], x: str, y: str, options: Mapping[str, Any]) -> str:
    """Draw a line for every variant, and a panel for every value of the column `col`."""
    import pandas
    import seaborn
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    facets = {"sharey": False, "legend_out": False}
    chosen: dict[str, Any] = {"kind": "line", "hue": "variant", "height": 3, "facet_kws": facets, **options}
    with seaborn.axes_style("whitegrid"):
        grid = seaborn.relplot(pandas.DataFrame(points), x=x, y=y, **chosen)
    grid.set(yscale="log", xscale="log" if x == "products" else "linear").set_titles("{col_name}")
    for axis in grid.axes.flat:  # 0.5 in place of a power of ten
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    seaborn.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0.02), ncol=grid.axes.size)
    grid.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(grid.figure)
    return f"{name}.png"


def _point(row: Row) -> dict[str, Any]:
    name, _, convention = name_cells(row)
    target = _target(row["pattern"], f"{100 * row['asked_sparsity']:g}%")
    kind = "N:M" if target == row["pattern"] else row["pattern"]
    return {"variant": f"{name}, {convention}", "target": target, "kind": kind, "sparsity": row.get("sparsity")}
