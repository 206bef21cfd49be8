"""The page of a run: report.html, a single file without network access, filled from the report alone."""

import json
import os
from collections import Counter, namedtuple
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from convexprune._container.provenance import is_page
from convexprune._storage.failures import writing
from convexprune._storage.staging import followed
from convexprune.errors import OutputError
from convexprune.report import Report

from . import charts
from .card import text_of
from .charts import SHADES, Grid, grid
from .facts import bytes_text, command_of, costs, facts, name_of_model, next_steps, reason, worst

WORST = 8
LISTED = 2000  # operators; of more, the page has the worst only
SPREAD = 0.005  # shares of zeros that differ by less are shown as one


Tile = namedtuple("Tile", "name value note")


def check_page(path: Path) -> Path:
    place = followed(path) if path.is_symlink() else path
    with writing(place):
        if not place.parent.is_dir():
            raise OutputError(f"{place}: there is no folder {place.parent}. Make it, or give another file.")
        if os.path.lexists(place) and not (place.is_file() and is_page(place)):
            raise OutputError(f"{place} is no page of a run, and is not replaced. Give another file.")
    return place


def page(report: Report, folder: str | None = None) -> str:
    folder = folder or str(report.environment.get("folder", "DIR"))
    held_out = all(o.held_out_error is not None for o in report.operators)
    return text_of(
        "page.html.jinja",
        title=name_of_model(report),
        report=report,
        tiles=list(_tiles(report)),
        facts=[fact for fact in (*facts(report), *costs(report)) if fact.name != "warning"],  # it shows these apart
        held_out=held_out,
        errors=_errors(report, "held_out_error" if held_out else "relative_error"),
        zeros=_zeros(report),
        pairs=_pairs(report),
        gaps=charts.histogram([o.gap for o in report.operators if o.gap is not None], 24, log=True),
        bounds=charts.histogram([o.bound["ratio"] for o in report.operators if o.bound is not None], 20, log=False),
        worst=[(o, reason(o, report)) for o in worst(report, WORST)],
        operators=report.operators if len(report.operators) <= LISTED else worst(report, LISTED),
        percent=charts.percent,
        size=charts,
        shades=range(SHADES),
        recipe=[(name, _said(value)) for name, value in report.recipe.items()],
        environment=[(name, _said(value)) for name, value in report.environment.items()],
        command=command_of(report, folder, whole_paths=True),
        steps=next_steps(report, folder),
    )


def _tiles(report: Report) -> Iterator[Tile]:
    for key, name, digits in (("value", "perplexity", 2), ("kl", "KL from dense", 4)):
        values = {model: float(p[key]) for model, p in report.perplexity.items() if p.get(key) is not None}
        note = _times(values) if key == "value" else "nats a token"
        if values:
            yield Tile(name, " → ".join(f"{value:.{digits}f}" for value in values.values()), note)
    if report.asks_for_zeros:
        weights = sum(o.outputs * o.inputs for o in report.operators)
        yield Tile("zeros", f"{100 * report.sparsity:.1f} %", f"of {weights / 1e6:,.1f} M weights")
    if known := [o.held_out_error for o in report.operators if o.held_out_error is not None]:
        yield Tile("held-out error", f"{charts.percent(fmean(known))} %", "mean over the operators")
    if report.median_bound_ratio is not None:
        yield Tile("lower bound", f"{report.median_bound_ratio:.2f}", "of the error no pruning avoids (median)")
    if report.bytes is not None:
        yield Tile("size", bytes_text(report.bytes), "on disk" if report.packed is None else "packed")
    longest = "".join(f"{_time(lap)} of it: {phase}" for phase, lap in Counter(report.seconds).most_common(1))
    yield Tile("time", _time(sum(report.seconds.values())), longest)
    if "process" in report.memory:
        peak = max((kind for kind in report.memory), key=lambda kind: (kind == "gpu", report.memory[kind]))
        yield Tile("peak memory", bytes_text(report.memory[peak]), "of the GPU" if peak == "gpu" else "of the process")


def _times(values: dict[str, float]) -> str:
    dense, pruned = (values.get(name) for name in ("dense", "pruned"))
    return f"{pruned / dense:.2f} times" if dense and pruned else ""


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def _zeros(report: Report) -> Grid | None:
    """Return the table of zeros; None if all operators have the same share."""
    shares = [o.sparsity for o in report.operators]
    if not shares or max(shares) - min(shares) < SPREAD:
        return None
    return grid(report.operators, lambda o: o.sparsity, lambda v: f"{100 * v:.0f}", log=False)


def _errors(report: Report, name: str) -> Grid:
    return grid(report.operators, lambda o: getattr(o, name), charts.percent, log=True)


def _pairs(report: Report) -> charts.Chart | None:
    fitted, held_out = (
        {cell.name: cell.value for cell in _errors(report, name).cells} for name in ("relative_error", "held_out_error")
    )
    return charts.pairs([(fitted[name], held_out[name], name) for name in fitted if name in held_out])


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
