"""The result of a run in words: facts, the command line that repeats it, likely reasons of large errors."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from statistics import fmean, median
from typing import Any

from convexprune._recipe_file import GIVEN
from convexprune._schema.settings import BUNDLED
from convexprune.errors import ConvexpruneError
from convexprune.recipe import make_recipe
from convexprune.report import OperatorReport, Report
from convexprune.solvers import solver_names

from .charts import place


def command_of(report: Report, folder: str, whole_paths: bool = False) -> str | None:
    """Return the command line that repeats a run; None if the model or the tokens were objects in memory."""
    chosen = _chosen(report.recipe)
    texts = [value for value in chosen.values() if isinstance(value, str)]
    if any(text.endswith(GIVEN) for text in texts) or chosen.get("solver", "fista") not in solver_names():
        return None
    named = {n: short(value) if isinstance(value, str) and not whole_paths else value for n, value in chosen.items()}
    model = [named.pop("model")] if "model" in named else []
    options = [part for name, value in named.items() for part in _option(name, value)]
    packed = [] if report.packed is None else ["--pack"]
    return shlex.join(["convexprune", "prune", *model, *options, *packed, "--output", folder])


def _chosen(recipe: dict[str, Any]) -> dict[str, Any]:
    kept = recipe
    for name in recipe:
        rest = {key: value for key, value in kept.items() if key != name}
        if _same(rest, recipe):
            kept = rest
    return kept


def _same(settings: dict[str, Any], recipe: dict[str, Any]) -> bool:
    try:
        return make_recipe(**settings).model_dump(mode="json") == recipe
    except ConvexpruneError:
        return False


def _option(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, dict):
        return [option, json.dumps(value)]
    values = value if isinstance(value, list | tuple) else [value]
    return [part for each in values for part in (option, json.dumps(each) if isinstance(each, dict) else str(each))]


@dataclass(frozen=True)
class Fact:
    name: str
    text: str


def facts(report: Report, stored: str = "their products") -> list[Fact]:
    """Return statements about a result, the same for a resumed run."""
    values = partial(_quantized, stored=stored)
    parts = (_zeros, values, _removed, _calibration, _errors, _perplexity, _certificates, _warnings, _download)
    return [fact for part in parts for fact in part(report)]


def costs(report: Report) -> list[Fact]:
    size = "" if report.bytes is None else f"; {bytes_text(report.bytes)} on disk"
    found = [Fact("time, size" if size else "time", f"{sum(report.seconds.values()):.0f} s{size}")]
    if report.memory:
        places = {"process": "", "workers": " in its largest worker", "gpu": " on the GPU"}
        peaks = (f"{bytes_text(report.memory[kind])}{place}" for kind, place in places.items() if kind in report.memory)
        found.append(Fact("peak memory", ", ".join(peaks)))
    return found


def bytes_text(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def name_of_model(report: Report) -> str:
    return short(str(report.recipe.get("model", BUNDLED)))


def short(name: str) -> str:
    """Return a name, or several with commas between, without the folders of the machine."""
    paths = [(part, PurePath(part)) for part in name.split(",")]
    return ", ".join(path.name or part if path.is_absolute() else part for part, path in paths)


def _zeros(report: Report) -> Iterator[Fact]:
    weights = sum(o.outputs * o.inputs for o in report.operators)
    if report.narrowed is None:  # else what is gone is no zero
        yield Fact("zeros", f"{report.sparsity:.2%} of {weights:,} weights in {len(report.operators)} operators")


def _quantized(report: Report, stored: str) -> Iterator[Fact]:
    bits, by = report.recipe.get("bits"), report.recipe.get("quantizer")
    if bits is not None and report.sized is None:
        yield Fact("values", f"{bits} bits a weight once packed: numbers times a scale for each column, by {by}")
    elif (sized := report.sized) is not None:
        kinds = Counter(kind for names, (kind, _) in sized["tensors"].items() for _ in names.split(", ")).most_common()
        yield Fact("values", f"{', '.join(f'{count} {kind}' for kind, count in kinds)}, by {by}; stored as {stored}")
        layout = report.recipe.get("quantize")
        yield Fact(f"exported, {layout}", f"{sized['bytes']:,} bytes, {sized['bits']:.2f} bits a weight of all")
    elif report.recipe.get("quantize") is not None:
        grids = sorted({operator.pattern.rpartition(", ")[2] for operator in report.operators})
        yield Fact("values", f"{', '.join(grids)}, by {by}; stored as {stored}")
    if report.ends:
        kinds = ", ".join(f"{name} {kind}" for name, kind in report.ends.items())
        yield Fact("embedding and head", f"{kinds}, by {by}; stored as {stored}")


def _removed(report: Report) -> Iterator[Fact]:
    if report.narrowed is not None:
        *widths, decoder, whole = report.narrowed.items()
        shares = (f"{1 - after / before:.1%}" for _, (before, after) in (decoder, whole))
        changed = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in widths)
        yield Fact("removed", "{} of the decoder layers' parameters, {} of all; {}".format(*shares, changed))


def _calibration(report: Report) -> Iterator[Fact]:
    if (dataset := report.recipe.get("dataset")) is None:
        return
    text = str(dataset)
    of = "that the caller gave" if text.endswith(GIVEN) else f"of {short(text)}"
    of = "of text that the model wrote itself" if text == "self" else of
    yield Fact("calibration", f"{max((o.tokens for o in report.operators), default=0):,} tokens {of}")


def _errors(report: Report) -> Iterator[Fact]:
    kinds: dict[str, Callable[[OperatorReport], float | None]] = {
        "error": lambda o: o.relative_error,
        "held-out error": lambda o: o.held_out_error,
    }
    for name, value in kinds.items():
        known = [(found, o) for o in report.operators if (found := value(o)) is not None]
        if known:
            error, largest = max(known, key=lambda pair: pair[0])
            mean = fmean(found for found, _ in known)
            yield Fact(name, f"mean {mean:.1e}, worst {error:.1e}: {largest.name} {_described(largest)}")
    if grown := [(o.weight_growth, o.name) for o in report.operators if o.weight_growth is not None]:
        growth, operator = max(grown)
        yield Fact("largest weight", f"up to {growth:.1f} times the dense operator's largest: {operator}")


def _described(o: OperatorReport) -> str:
    found = [f"{o.outputs}x{o.inputs}", f"{o.sparsity:.0%} zeros", f"{o.tokens:,} tokens"]
    if o.damping is not None:
        found.append(f"damping {o.damping.strength:.2f}")
    if o.status not in (None, "SOLVED"):
        found.append(str(o.status))
    return f"({', '.join(found)})"


def text_of_evaluation(report: Report) -> str:
    text = str(report.recipe.get("evaluation"))
    if text == "self":
        return "text that the dense model wrote itself, which flatters"
    if text == "held-out":
        return "the held-out samples"
    return "the text that the caller gave" if text.endswith(GIVEN) else f"the text {short(text)}"


def _perplexity(report: Report) -> Iterator[Fact]:
    if found := report.perplexity:
        values = ", ".join(f"{name} {p['value']:.3f}" for name, p in found.items())
        p = next(iter(found.values()))
        of = text_of_evaluation(report)
        yield Fact("perplexity", f"{values} on {p['windows']} windows of {p['window']} tokens of {of}")
        if (kl := found.get("pruned", {}).get("kl")) is not None:
            yield Fact("KL from dense", f"{kl:.4f} nats a token on the same text")


def _certificates(report: Report) -> Iterator[Fact]:
    if report.largest_gap is not None:
        worst = max((o for o in report.operators if o.gap is not None), key=lambda o: o.gap or 0.0)
        which = "" if worst.status == "SOLVED" else f": {worst.name}, {worst.status}, error {worst.relative_error:.0e}"
        yield Fact("largest gap", f"{report.largest_gap:.1e}, relative, of a final convex solve{which}")
    if report.median_bound_ratio is not None:
        yield Fact(
            "lower bound",
            f"it is proven that no pruning has less than {report.median_bound_ratio:.2f} of the error (median); "
            "what is possible may be much nearer to 1",
        )
    if over := [o.facts["codes_over_best"] for o in report.operators if "codes_over_best" in o.facts]:
        text = (
            f"the error of a few rows is {median(over):.3f} times the least that a wide beam of sweeps finds (median)"
        )
        yield Fact("codes", text)


def _download(report: Report) -> Iterator[Fact]:
    if report.packed is not None:
        before, after = bytes_text(report.packed["before"]), bytes_text(report.packed["after"])
        own = report.packed.get("operator_bits")
        bits = ("" if own is None else f"{own:.2f} of the operators, ") + f"{report.packed['bits']:.2f} of all"
        sizes = f"{after}, packed from {before} (bits a weight: {bits})"
        yield Fact("download", f"{sizes}; unpacked, memory and speed are those of the {before}")


def _warnings(report: Report) -> Iterator[Fact]:
    if report.short_of_tokens:
        yield Fact("note", f"{len(report.short_of_tokens)} operators of experts got fewer tokens than they have inputs")
    if repaired := [o.name for o in report.operators if "repairs" in o.facts]:
        reason = "on held-out tokens the first fit was worse than no operator, so these tokens chose a stronger damping"
        yield Fact("note", f"{len(repaired)} operators were refitted, first {repaired[0]}: {reason}")
    if refined := [o.facts for o in report.operators if "refine_held_out" in o.facts]:
        left = median(f["refine_held_out"] / (f["refine_held_out_before"] or 1) for f in refined)
        stayed, tokens = sum("refine_steps" not in f for f in refined), max(o.held_out_tokens for o in report.operators)
        yield Fact(
            "refined",
            f"the output error of a layer on {'held-out' if tokens else 'calibration'} tokens is {left:.3f} of what it "
            f"was (median); {stayed} operators kept their values, because no others were better",
        )
    for warning in report.warnings:
        yield Fact("warning", warning)


def next_steps(report: Report, folder: str) -> list[Fact]:
    place, pretrained = shlex.quote(folder), shlex.quote(f"pretrained={folder}")
    window = next((f" --window {p['window']}" for p in report.perplexity.values()), "")
    if report.packed is not None:
        return [
            Fact("Make an ordinary folder of it, which all other commands read", f"convexprune unpack {place} MODEL")
        ]
    steps = {
        "Measure it on your own text": f"convexprune eval {place} --text TEXT{window}",
        "Measure what it can do (lm-eval)": f"lm_eval --model hf --model_args {pretrained} --tasks hellaswag",
        **({"Check the answers against other solvers": f"convexprune verify {place}"} if report.identity else {}),
        "See what runs faster on your machine": f"convexprune bench {place}",
        "Make the download smaller": f"convexprune pack {place} PACK",
    }
    return [Fact(name, command) for name, command in steps.items()]


OVERFITTED = 2.0  # held-out error over calibration error from which the sample is named as the reason
HARD = 0.8  # of the error that no pruning avoids, from which that is named as the reason
MORE_ZEROS = 0.05  # than the whole model, from which the share is named as the reason
UNLIKE = 2.0  # times the median of operators of the same name, from which the layer is named as the reason


def worst(report: Report, count: int) -> list[OperatorReport]:
    return sorted(report.operators, key=_judged, reverse=True)[:count]


def reason(o: OperatorReport, report: Report) -> str:
    if o.status not in (None, "SOLVED"):
        return f"its last solve ended as {o.status}"
    if o.tokens < o.inputs:
        return f"only {o.tokens:,} calibration tokens for {o.inputs:,} inputs"
    if o.held_out_error is not None and o.held_out_error > OVERFITTED * o.relative_error:
        times = o.held_out_error / o.relative_error if o.relative_error else float("inf")
        return f"{times:.1f} times the error on held-out tokens: more calibration samples help"
    if o.sparsity > report.sparsity + MORE_ZEROS:
        return f"it has more zeros than the whole model: {100 * o.sparsity:.0f} %"
    if o.bound is not None and o.bound["ratio"] > HARD:
        return f"no pruning has less than {o.bound['ratio']:.2f} of this error"
    name = place(o.name)[1]
    usual = median([_judged(other) for other in report.operators if place(other.name)[1] == name])
    last = name.rpartition(".")[2]
    if usual > 0 and _judged(o) > UNLIKE * usual:
        return f"its layer: {_judged(o) / usual:.1f} times the median of all {last}"
    return f"its place: {last} has such errors in most layers"


def _judged(o: OperatorReport) -> float:
    error = o.relative_error if o.held_out_error is None else o.held_out_error
    return float("inf") if error != error else error
