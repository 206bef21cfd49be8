"""`inspect`: predict a run's work and needs on a model from its configuration alone; no weight is read."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._device.machine import default_device
from convexprune._device.switches import pinned
from convexprune._layerwise.settings import LayerSettings
from convexprune._runs import cost, sizes
from convexprune._runs.cost import load, measured_speed, seconds
from convexprune._runs.executors import check_patterns
from convexprune._schema.functions import INSPECT
from convexprune._schema.parameters import documented
from convexprune.errors import CalibrationError, RecipeError
from convexprune.recipe import Recipe, make_recipe

from .._data.sources import needs_sampling
from .._discovery.selection import with_rules
from .._loading.loading import bundled_if_none
from .outline import bytes_by_change, gib, read_outline, setting_of

TRIALS = "The networks with a step in a single layer that allocation 'measured' compares are not counted."
NO_GPU = "The time is an estimate by the rate of products. It was never compared with a run on a GPU."


@dataclass(frozen=True)
class Inspection:
    """Sizes, needs, an estimate of the time, and the fit into a device's memory.

    Args:
        model: name of the model.
        recipe: settings of the run.
        operators: number of pruned operators.
        weights: number of their weights.
        zeros: number of zeros after the run.
        left_alone: reasons by name of untouched matrix.
        size: size of the model.
        memory: bytes by part.
        work: operations of the run.
        seconds: estimates by phase.
        device: device of the run.
        device_memory: bytes of the device, or None.
        changes: settings that need less memory, with the bytes that the run then needs.
        notes: unknown quantities, and their consequences.
    """

    model: str
    recipe: dict[str, Any]
    operators: int
    weights: int
    zeros: int
    left_alone: Mapping[str, str]
    size: sizes.ModelSize
    memory: cost.Memory
    work: cost.Operations
    seconds: Mapping[str, float]
    device: str
    device_memory: int | None
    changes: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def needed(self) -> int:
        """Bytes of the device."""
        return self.memory.device

    @property
    def fits(self) -> bool:
        """True if the run fits, or if no memory was given."""
        return self.device_memory is None or self.needed <= self.device_memory

    @property
    def forecast(self) -> str:
        """Time and memory, in words."""
        needed = self.memory.all if self.device == "cpu" else self.needed
        return f"some {_time(sum(self.seconds.values()))} on {self.device} {load()}; {gib(needed)} of memory"

    def verdict(self) -> Iterator[str]:
        """Yield sentences: the fit, and otherwise the settings to change."""
        if self.device_memory is None:
            return
        room = gib(self.device_memory)
        if self.fits:
            yield f"It fits: {gib(self.needed)} of {room}."
            return
        yield f"It does not fit: {gib(self.needed)} of {room}. What other settings need:"
        for way, needed in self.changes.items():
            yield f"  {way}: {gib(needed)}, which {'fits' if needed <= self.device_memory else 'is too much as well'}"
        widest = max(
            (s for layer in self.size.layers for s in layer.stacks), key=lambda s: s.inputs * (s.inputs + s.outputs)
        )
        yield f"  --ignore {' --ignore '.join(dict.fromkeys(widest.names))}: leaves the largest problem out"

    def to_json(self) -> str:
        """Return the inspection as JSON."""
        more = {"fits": self.fits, "device_bytes": self.memory.device, "cpu_bytes": self.memory.all}
        return json.dumps(asdict(self) | more, indent=2)

    def tables(self) -> Iterator[Table]:
        """Yield tables for a terminal: operators, untouched matrices, needs."""
        yield _problems(self)
        if self.left_alone:
            yield _left_alone(self.left_alone)
        yield _needs(self)


@pinned()
@documented(INSPECT)
def inspect(source: str | Path | None = None, **settings: Any) -> Inspection:
    """Predict work and needs of a run on a model, without its weights.

    Only the configuration is read. Memory follows from formulas, and time from products that are timed on `device`
    now: an estimate.

    Args:
        source: a folder, a config.json, or a name on the hub; None: the bundled model.
        settings: by name:
        {settings}

    Returns:
        The inspection.

    Raises:
        RecipeError, PatternError: settings that do not exist or do not fit.
        ModelError: the configuration cannot be read, or names a model that cannot be pruned.
        CalibrationError: the windows are longer than the model's limit.
    """
    asked, settings = INSPECT.read(settings)
    device_memory: int | None = asked.device_memory
    settings = bundled_if_none(settings | {"model": source})
    place: str | Path = settings["model"]
    checked = make_recipe(**settings | {"model": str(place)})
    device = default_device(checked.device)
    if removed := checked.build_pattern().removes:
        raise RecipeError(
            f"inspect has no weights, and pattern {checked.pattern!r} finds its {removed} by them. "
            "`convexprune prune ... --dry-run` reads them, and says what that run needs."
        )
    outline = read_outline(place, checked, asked.trust_remote_code)
    layers = with_rules(checked.layer_settings(), checked, outline.layers)
    check_patterns(outline.layers, layers)
    setting = setting_of(checked, outline)
    if setting.length > outline.positions:
        raise CalibrationError(
            f"max_seq_length={setting.length}: {outline.name} can see {outline.positions} tokens at most."
        )
    if device != "cpu" and device_memory is None:
        device_memory = torch.cuda.get_device_properties(device).total_memory
    memory, work = cost.memory(outline.size, setting), cost.work(outline.size, setting)
    return Inspection(
        model=outline.name,
        recipe=checked.model_dump(mode="json") | {"max_seq_length": setting.length},
        operators=sum(len(layer.operators) for layer in outline.layers),
        weights=sum(prod(operator.shape) for layer in outline.layers for operator in layer.operators),
        zeros=sum(
            layers.pattern_of(f"{layer.name}.{operator.name}").zeros(*operator.shape)
            for layer in outline.layers
            for operator in layer.operators
        ),
        left_alone=outline.left_alone,
        size=outline.size,
        memory=memory,
        work=work,
        seconds=seconds(work, measured_speed(device, outline.dtype), setting.method),
        device=device,
        device_memory=device_memory,
        changes=bytes_by_change(checked, outline, setting),
        notes=(*outline.notes, *_notes(checked, layers), *([] if device == "cpu" else [NO_GPU])),
    )


def _notes(recipe: Recipe, settings: LayerSettings) -> Iterator[str]:
    if recipe.allocation == "measured":
        yield TRIALS
    for number, rule in enumerate(recipe.rules, 1):
        count = sum(each == number for each in settings.rules.values())
        said = {"sparsity": rule.sparsity, "pattern": rule.pattern, "method": rule.method}
        own = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        yield f"Rule {number} ({', '.join(rule.targets)}): {own}, for {count} operators."
    if recipe.target is not None:
        yield "The size of the file was not checked, which takes a tokenizer: `convexprune prune ... --dry-run` does."
    if settings.pruners:
        yield f"Memory and time are those of the method {recipe.method} for all."


# ---- tables


def _problems(found: Inspection) -> Table:
    title = f"{found.model}: {found.operators} operators, {found.weights:,} weights, {found.zeros:,} of them to be zero"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("operators of one problem")
    for name in ("rows x width", "stage", "layers", "weight and Gram"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in found.size.layers:
        for number, stage in enumerate(layer.stages):
            alike = Counter((s.outputs, s.inputs, s.token_aligned) for s in stage)
            first = {(s.outputs, s.inputs, s.token_aligned): s for s in reversed(stage)}
            for key, count in alike.items():
                names = ", ".join(first[key].names) + (f" and {count - 1} alike" if count > 1 else "")
                heavy = count * 4 * (key[0] * key[1] + key[1] ** 2)
                cells = f"{key[0]} x {key[1]}", str(number + 1), str(layer.count), gib(heavy)
                table.add_row(names, *cells)
    return table


def _left_alone(reasons: Mapping[str, str]) -> Table:
    table = Table(title=f"Left alone: {len(reasons)}", box=SIMPLE_HEAD)
    table.add_column("linear map")
    table.add_column("why")
    together: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        together.setdefault(reason, []).append(name)
    for reason, names in together.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        table.add_row(names[0] + more, reason)
    return table


def _needs(found: Inspection) -> Table:
    m, w = found.memory, found.work
    table = Table(title="What it takes", box=SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    parts = {"fixed": m.fixed, "layer": m.layer, "moments": m.moments, "method": m.method, "batch": m.batch}
    parts |= {"problems side by side": m.beside}
    table.add_row("device", gib(m.device), " + ".join(f"{name} {gib(part)}" for name, part in parts.items() if part))
    table.add_row("host", gib(m.host), f"beside a GPU; on a CPU all is in one memory: {gib(m.all)}")
    table.add_row("disk", gib(m.disk), "finished layers, the result, hidden states, recorded inputs")
    if needs_sampling(found.recipe["dataset"]):
        table.add_row("", gib(found.size.bytes), "on the device, once, if the model writes its own text (dataset self)")
    table.add_row("products", f"{w.products:,.0f}", f"rows x width times width x width, in {w.problems:,} problems")
    flops = {"forward": w.forward, "Gram": w.gram, "solve": w.solve + w.judge}
    table.add_row("operations", f"{sum(flops.values()):.1e}", ", ".join(f"{n} {f:.1e}" for n, f in flops.items()))
    laps = ", ".join(f"{name} {_time(lap)}" for name, lap in found.seconds.items())
    total = _time(sum(found.seconds.values()))
    spread = "layers" if found.recipe["prefix"] == "dense" else "the samples of each layer"
    table.add_row(
        "time",
        total,
        f"an estimate on this machine ({found.device}) {load()}: {laps}; {spread} can be spread over workers",
    )
    return table


def _time(span: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if span >= 2 * length:
            return f"{span / length:.1f} {unit}"
    return f"{span:.1f} s"
