"""What a run came to, in the 80 columns of any terminal; the rest is in report.json."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from convexprune.report import OperatorReport, Report

WIDTH = 80


def summary(report: "Report", folder: Path) -> Table:
    """Totals, mean and worst errors and whose they are, perplexity, certificates, time and size."""
    table = Table.grid(padding=(0, 2))
    table.width = WIDTH
    table.add_column(no_wrap=True)
    table.add_column()
    weights = sum(o.outputs * o.inputs for o in report.operators)
    table.add_row("zeros", f"{report.sparsity:.2%} of {weights:,} weights in {len(report.operators)} operators")
    for row in (*_narrowed(report), *_errors(report), *_perplexity(report), *_certificates(report), *_warnings(report)):
        table.add_row(*row)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    for row in _packed(report):
        table.add_row(*row)
    table.add_row("time, size", f"{sum(report.seconds.values()):.0f} s; {sum(sizes) / 1e6:,.1f} MB on disk")
    return table


def _errors(report: "Report") -> Iterator[tuple[str, str]]:
    """Relative errors, on tokens that were fitted and on those that were not."""
    kinds: dict[str, Callable[[OperatorReport], float | None]] = {
        "error": lambda o: o.relative_error,
        "held-out error": lambda o: o.held_out_error,
    }
    for name, value in kinds.items():
        known = [(found, o) for o in report.operators if (found := value(o)) is not None]
        if known:
            error, worst = max(known, key=lambda pair: pair[0])
            mean = fmean(found for found, _ in known)
            yield name, f"mean {mean:.1e}, worst {error:.1e}: {worst.name} {_facts(worst)}"


def _facts(o: "OperatorReport") -> str:
    """What may be why its error is what it is."""
    facts = [f"{o.outputs}x{o.inputs}", f"{o.sparsity:.0%} zeros", f"{o.tokens:,} tokens"]
    if o.damping is not None:
        facts.append(f"damping {o.damping.strength:.2f}")
    if o.status not in (None, "SOLVED"):
        facts.append(str(o.status))
    return f"({', '.join(facts)})"


def _perplexity(report: "Report") -> Iterator[tuple[str, str]]:
    found = report.perplexity
    if found:
        values = ", ".join(f"{name} {p['value']:.3f}" for name, p in found.items())
        p = next(iter(found.values()))
        own = report.recipe.get("evaluation") == "self"
        text = "of text that the dense model wrote itself, which flatters" if own else "of the text"
        yield "perplexity", f"{values} on {p['windows']} windows of {p['window']} tokens {text}"


def _certificates(report: "Report") -> Iterator[tuple[str, str]]:
    if report.largest_gap is not None:
        yield "largest gap", f"{report.largest_gap:.1e}, relative, of a final convex solve"
    if report.median_bound_ratio is not None:
        yield (
            "lower bound",
            f"it is proven that no pruning has less than {report.median_bound_ratio:.2f} of the error (median); "
            "what is possible may be much nearer to 1",
        )


def _narrowed(report: "Report") -> Iterator[tuple[str, str]]:
    if report.narrowed is not None:
        *widths, decoder, whole = report.narrowed.items()
        shares = (f"{1 - after / before:.1%}" for _, (before, after) in (decoder, whole))
        changed = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in widths)
        yield "removed", "{} of the decoder layers' parameters, {} of all; {}".format(*shares, changed)


def _packed(report: "Report") -> Iterator[tuple[str, str]]:
    if report.packed is not None:
        before, after = report.packed["before"] / 1e6, report.packed["after"] / 1e6
        sizes = f"{after:,.1f} MB, packed from {before:,.1f} MB ({report.packed['bits']:.2f} bits a weight)"
        yield "download", f"{sizes}; unpacked, memory and speed are those of the {before:,.1f} MB"


def _warnings(report: "Report") -> Iterator[tuple[str, str]]:
    if report.short_of_tokens:
        yield "note", f"{len(report.short_of_tokens)} operators of experts got fewer tokens than they have inputs"
    for warning in report.warnings:
        yield "warning", warning
