"""Pictures of a comparison (matplotlib, an optional package)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from math import exp
from pathlib import Path
from typing import Any

from convexprune.errors import DependencyError, install_hint

Row = Mapping[str, Any]


def will_draw(plots: bool | None) -> bool:
    """Whether plots are drawn.

    Args:
        plots: what was asked for; None is: if matplotlib is installed.
    """
    there = find_spec("matplotlib") is not None
    if plots and not there:
        raise DependencyError(f"Plots need matplotlib: {install_hint('plot')}, or ask for none (--no-plots).")
    return there if plots is None else plots


def draw(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw the results of a comparison.

    Error and held-out error by decoder layer, one panel for each pattern; error against matrix products; error,
    divergence from dense and perplexity against sparsity, one line for each method and convention, one panel for each
    text.
    """
    rows = result["rows"]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(_target(row), []).append(row)
    names = [
        _by_layer(folder, panels, "error_by_layer", "relative error, calibration tokens"),
        _by_layer(folder, panels, "held_out_error_by_layer", "relative error, held-out tokens"),
        _products(folder, panels),
        _by_sparsity(folder, rows, "error", {"relative error, held-out tokens": _error}),
    ]
    for measure, label in (("kl", "KL divergence from dense"), ("perplexity", "perplexity")):
        panel = {f"{label}, {text}": partial(_on_text, text, measure) for text in result["dense"]["texts"]}
        if panel:
            names.append(_by_sparsity(folder, rows, measure, panel))
    return names


def draw_samples(summary: Mapping[str, Any], folder: Path) -> str:
    """Draw the results of a comparison on several samples.

    One panel for each text: KL divergence from dense over the first variant's, with two standard errors.

    Args:
        summary: of `compare_samples`.
    """
    from matplotlib.ticker import MaxNLocator

    rows, texts = summary["rows"], list(summary["dense"]["texts"])
    figure, axes = _figure(len(texts), height=1.5 + 0.25 * len(rows))
    for axis, text in zip(axes, texts, strict=True):
        for place, row in enumerate(reversed(rows)):
            found = row["texts"][text]["kl"]
            if found is not None:
                reach = exp(2 * found["error"])
                below, above = found["ratio"] * (1 - 1 / reach), found["ratio"] * (reach - 1)
                axis.errorbar(
                    found["ratio"], place, xerr=[[below], [above]], fmt="o", markersize=3, capsize=2, color="C0"
                )
        axis.axvline(1, color="grey", linewidth=0.5)
        axis.set(title=text, xlabel="KL divergence over the first variant's", xscale="log")
        axis.xaxis.set(major_locator=MaxNLocator(5), major_formatter="{x:.3g}", minor_formatter="")
        axis.set_yticks(range(len(rows)), [f"{_target(row)} {_label(row)}" for row in reversed(rows)], fontsize=6)
    return _save(figure, folder, "divergence-over-first.png")


def _by_layer(folder: Path, panels: Mapping[str, Sequence[Row]], key: str, label: str) -> str:
    figure, axes = _figure(len(panels))
    for axis, (target, rows) in zip(axes, panels.items(), strict=True):
        for row in rows:
            values = [float("nan") if value is None else value for value in row[key]]
            axis.plot(range(len(values)), values, label=_label(row), linewidth=1)
        axis.set(title=target, xlabel="decoder layer", ylabel=label, yscale="log")
        axis.legend(fontsize=6)
    return _save(figure, folder, f"{key.replace('_', '-')}.png")


def _products(folder: Path, panels: Mapping[str, Sequence[Row]]) -> str:
    figure, axes = _figure(len(panels))
    for axis, (target, rows) in zip(axes, panels.items(), strict=True):
        for row in rows:
            axis.plot([row["products"]], [_error(row)], "o", label=_label(row))
        axis.set(title=target, xlabel="matrix products a group", ylabel="relative error, held-out tokens")
        axis.set_xscale("symlog", linthresh=10)
        axis.legend(fontsize=6)
    return _save(figure, folder, "error-against-products.png")


def _by_sparsity(folder: Path, rows: Sequence[Row], name: str, panels: Mapping[str, Callable[[Row], float]]) -> str:
    """One colour for each method; N:M patterns are crosses, joined where there are several."""
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(len(panels))
    lines: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        lines.setdefault((_label(row), row["pattern"] == "unstructured"), []).append(row)
    colours = _colours(lines)
    sparsities = sorted({row["asked_sparsity"] for row in rows})
    for axis, (what, value) in zip(axes, panels.items(), strict=True):
        for (label, unstructured), members in lines.items():
            points = sorted((row["sparsity"], value(row)) for row in members)
            style = "o-" if unstructured else "x:"
            shown = label if unstructured else f"{label}, N:M"
            axis.plot(*zip(*points, strict=True), style, color=colours[label], label=shown, linewidth=1, markersize=4)
        axis.set(xlabel="sparsity", ylabel=what, yscale="log")
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5, 7)), major_formatter="{x:.6g}", minor_formatter="")
        axis.set_xticks(sparsities, [f"{sparsity:.0%}" for sparsity in sparsities])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return _save(figure, folder, f"{name}-against-sparsity.png")


def _colours(lines: Iterable[tuple[str, bool]]) -> dict[str, str]:
    """One for each label. Rows do not compete at N:M, so there "fista" has that of "fista rows", if it has none."""
    colours: dict[str, str] = {}
    for label, unstructured in sorted(lines, key=lambda line: not line[1]):
        kin = next((other for other in colours if other.startswith(f"{label} ")), label)
        colours.setdefault(label, colours.get(label if unstructured else kin, f"C{len(colours)}"))
    return colours


def _on_text(text: str, measure: str, row: Row) -> float:
    return row["texts"][text][measure]


def _error(row: Row) -> float:
    """The mean error on held-out tokens, or on calibration tokens if none were held out."""
    held_out = row["held_out_error"]["mean"]
    return row["error"]["mean"] if held_out is None else held_out


def _target(row: Row) -> str:
    return f"{row['asked_sparsity']:.0%}" if row["pattern"] == "unstructured" else row["pattern"]


def _label(row: Row) -> str:
    words = [row["method"], row["convention"], *([] if row["allocation"] == "uniform" else [row["allocation"]])]
    words += ["by row"] if row["quota"] == "row" else []
    return " ".join(words)


def _figure(panels: int, height: float = 5) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _save(figure: Any, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=120)
    return name
