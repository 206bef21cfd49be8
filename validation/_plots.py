"""Pictures of a comparison (seaborn, an optional package)."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import exp
from pathlib import Path
from typing import Any

from convexprune.errors import DependencyError, install_hint

Row = Mapping[str, Any]
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
    rows, texts = result["rows"], list(result["dense"]["texts"])
    names = []
    for key, label in LAYER.items():
        places = ((row, i, value) for row in rows for i, value in enumerate(row[key]) if value is not None)
        points = [_point(row) | {"layer": i, label: value} for row, i, value in places]
        if not points:
            continue  # nothing was held out
        names.append(_lines(folder, key.replace("_", "-"), points, "layer", label, col="target", errorbar=None))
    errors = [_point(row) | {"products": 1 + row["products"], "relative error": _error(row)} for row in rows]
    names.append(
        _lines(folder, "error-against-products", errors, "products", "relative error", "scatter", col="target")
    )
    names.append(_lines(folder, "error-against-sparsity", errors, "sparsity", "relative error", style="kind"))
    for measure in ("kl", "perplexity") if texts else ():
        points = [_point(row) | {"text": text, measure: row["texts"][text][measure]} for row in rows for text in texts]
        names.append(
            _lines(folder, f"{measure}-against-sparsity", points, "sparsity", measure, col="text", style="kind")
        )
    return names


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


def _lines(folder: Path, name: str, points: Sequence[Row], x: str, y: str, kind: Any = "line", **options: Any) -> str:
    """Draw a line for every variant, and a panel for every value of the column `col`."""
    import pandas
    import seaborn
    from matplotlib import pyplot

    table = pandas.DataFrame(points)
    options |= {"markers": True} if options.get("style") else {}
    with seaborn.axes_style("whitegrid"):
        grid = seaborn.relplot(
            table, x=x, y=y, hue="variant", kind=kind, height=4, facet_kws={"sharey": False}, **options
        )
    grid.set(yscale="log", xscale="log" if x == "products" else "linear")
    grid.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(grid.figure)
    return f"{name}.png"


def _error(row: Row) -> float:
    """Return the mean error on held-out tokens, or on calibration tokens if none were held out."""
    held_out = row["held_out_error"]["mean"]
    return row["error"]["mean"] if held_out is None else held_out


def _point(row: Row) -> dict[str, Any]:
    unstructured = row["pattern"] == "unstructured"
    words = [row["method"], row["convention"], *([] if row["allocation"] == "uniform" else [row["allocation"]])]
    words += ["by row"] if row["quota"] == "row" else []
    target = f"{row['asked_sparsity']:.0%}" if unstructured else row["pattern"]
    kind = "unstructured" if unstructured else "N:M"
    return {"variant": " ".join(words), "target": target, "kind": kind, "sparsity": row.get("sparsity")}
