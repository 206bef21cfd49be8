"""`advise`: ways to a smaller or faster model that reach a target, with measured costs."""

import csv
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._container.layouts import LAYOUTS, imported
from convexprune._device.switches import pinned
from convexprune._schema import functions as doors
from convexprune._schema.functions import MEASURED_ON
from convexprune._schema.parameters import documented
from convexprune.adapters import Outline, alike, bundled_if_none, read_outline, require_exportable
from convexprune.errors import DependencyError, ModelError, RecipeError
from convexprune.recipe import make_recipe

AS_IT_IS = "the model as it is, in 16 bits"
NO_FOLDER = "Bytes of whole files are counted for the folder of a model: download it for those."
LOSSLESS = {torch.bfloat16: 10.6, torch.float16: 13.7}  # bits of a weight in a pack, whatever it is (docs/pack.md)


@dataclass(frozen=True)
class Way:
    """A way to a smaller model, with measurements on a reference model."""

    name: str
    arguments: str
    then: str  # the next command: "pack", "export", or empty
    disk: float  # bits per operator weight on disk
    memory: float  # bits per operator weight in the memory of the runtime
    kept: float  # share of the decoder layers' parameters left in the reference model; an estimate for others
    perplexity: float  # on WikiText-2
    dense: float
    source: str

    @property
    def times(self) -> float:
        return self.perplexity / self.dense

    def stored(self, dtype: torch.dtype) -> tuple[str, float, float]:
        """Return the arguments, and bits of operators and of all else on disk, of a model in `dtype`.

        Packs of pruned weights were measured in bfloat16, and nothing is of use in float32: those are cast.
        """
        is_pack, arguments = self.then == "pack", self.arguments
        if dtype not in LOSSLESS or (is_pack and arguments and dtype != torch.bfloat16):
            arguments, dtype = f"{arguments or '--sparsity 0'} --dtype bfloat16", torch.bfloat16
        rest = LOSSLESS[dtype] if is_pack else 16
        return arguments, rest if is_pack and not self.arguments else self.disk, rest


@dataclass(frozen=True)
class Advised:
    """A way for a given model."""

    way: Way
    disk: int  # bytes of all files of weights
    memory: int  # bytes of all weights in memory
    bits: float  # on disk, per weight of the dense model
    faster: float  # tokens per second at batch 1 over dense, if memory decides: bytes read by dense over bytes read
    reaches: bool
    commands: tuple[str, ...]  # to run; none if the model already reaches the target


@dataclass(frozen=True)
class Advice:
    """The ways, in front the cheapest that reaches the target.

    Args:
        model: name of the model.
        nbytes: bytes of the dense model.
        target: the request, in words.
        ways: all ways, but for those that `export` would refuse.
        files: bytes of the whole file of weights by options of `prune`, the least and the most; for a folder only.
        notes: reasons why files or ways are missing.
    """

    model: str
    nbytes: int
    target: str
    ways: tuple[Advised, ...]
    files: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the advice as plain data."""
        return asdict(self) | {"measured_on": MEASURED_ON}

    def tables(self) -> Iterator[Table]:
        """Yield the table of all ways, those beside the target dimmed."""
        heads = ("", "all files", "bits of operators", "of all", "in memory", "perplexity over dense", "from")
        table = Table(*heads, box=SIMPLE_HEAD)
        table.title = f"{self.model}: {self.nbytes / 1e6:,.0f} MB in 16 bits. Target: {self.target}"
        for each in self.ways:
            way, disk, memory = each.way, f"{each.disk / 1e6:,.0f} MB", f"{each.memory / 1e6:,.0f} MB"
            cells = (way.name, disk, f"{way.disk:.2f}", f"{each.bits:.2f}", memory, f"{way.times:.2f}", way.source)
            table.add_row(*cells, style=None if each.reaches else "dim")
        yield table
        if self.files:
            table = Table("convexprune prune MODEL ...", "bytes of the whole file", box=SIMPLE_HEAD)
            for options, (least, most) in self.files.items():
                table.add_row(options, f"{least:,}" if least == most else f"{least:,} to {most:,}, as asked")
            yield table

    def verdict(self) -> Iterator[str]:
        """Yield the advice as sentences."""
        yield from self.notes
        best = next((each for each in self.ways if each.reaches), None)
        if best is None:
            yield f"No measured way reaches {self.target}. Take a smaller model, or --bits after channels."
            if self.files:
                least = min(least for least, _ in self.files.values())
                yield f"The smallest of the files above has {least:,} bytes. Their quality is not forecast."
            return
        if not best.commands:
            yield f"{self.target}: {best.way.name}. Nothing has to be done."
            return
        yield f"{self.target}: {best.way.name}, {best.way.times:.2f} times the dense perplexity."
        yield from (f"  {command}" for command in best.commands)
        own = f"convexprune eval DIR --against {shlex.quote(self.model)}"
        yield f"An estimate, by measurements on {MEASURED_ON}. For yours: {own}"


def measured() -> list[Way]:
    text = (package_files("convexprune") / "data" / "measured.csv").read_text(encoding="utf-8")
    numbers = ("disk", "memory", "kept", "perplexity", "dense")
    rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
    for row in rows:
        row.update({name: float(row[name]) for name in numbers})
    return [Way(**row) for row in rows]


def measured_near(bits: float) -> str:
    """Return what so many bits a weight of a whole file may cost, by the quantization measured with the nearest."""
    near = min((way for way in measured() if "--sparsity 0 " in way.arguments), key=lambda way: abs(way.disk - bits))
    return (
        f"{bits:.2f} bits a weight of the whole file. {MEASURED_ON}, had {near.times:.2f} times the perplexity at "
        f"{near.disk:g} bits a weight of its operators. Yours is not known"
    )


Sizes = dict[str, tuple[int, int]]
"""Bytes of a whole file by the options of `prune`: the least and the most."""


def file_sizes(folder: Path, outline: Outline) -> tuple[Sizes, list[str]]:
    """Return sizes by options, and reasons for layouts that cannot say the model."""
    found, notes = Sizes(), list[str]()
    if outline.dtype == torch.float32:
        notes.append("What is not quantized is float32 in these files. With --dtype bfloat16 it has half of the bytes.")
    for layout in LAYOUTS:
        try:
            found |= dict(_sizes(folder, outline, layout))
        except (DependencyError, ModelError) as cause:
            notes.append(f"{layout}: {cause}")
    return found, notes


def _sizes(folder: Path, outline: Outline, layout: str) -> Iterator[tuple[str, tuple[int, int]]]:
    measure: Any = imported(layout).measure
    groups = alike(outline.layers)
    single, mixed = (measure(folder, groups, ends, outline.dtype) for ends in ([], outline.ends))
    if strangers := [unit[0] for unit, sizes in mixed.units.items() if not sizes]:
        raise ModelError(f"no type fits {strangers[0]}: its columns are no multiple of 32.")
    for kind in next(iter(single.units.values())):
        if all(kind in sizes for sizes in single.units.values()):
            total = single.total({name: kind for unit in single.units for name in unit})
            yield f"--quantize {_option(kind)}", (total, total)
    yield f"--quantize {layout} --target SIZE", (mixed.least, mixed.most)


def _why_no_export(folder: Path, outline: Outline) -> list[str]:
    """Return why `export` refuses the model once quantized, if it does, and which ways are left out for it."""
    try:
        require_exportable(folder, outline.layers, outline.ends, outline.left_alone)
    except ModelError as cause:
        left = ", ".join(way.name for way in measured() if way.then == "export")
        return [f"Without {left}, which export refuses: {cause}"]
    return []


def _option(kind: str) -> str:
    name, _, group = kind.partition(" in groups of ")
    row = " per output channel"
    return f"{name} --group-size {group}" if group else name.replace(row, " --group-size -1")


@pinned()
@documented(doors.ADVISE)
def advise(model: str | Path | None = None, **settings: Any) -> Advice:
    """List ways to a smaller or faster model that reach a target, with measured costs.

    Only the configuration is read. Sizes follow from the configuration, apart from the share of channels in the layers.
    Perplexities are of a reference model.

    Args:
        model: a folder, a config.json, or a name on the hub; None: the bundled one.
        settings: by name:
        {settings}

    Returns:
        The ways.

    Raises:
        RecipeError: not one target.
        ModelError: the configuration cannot be read, or names a model that cannot be pruned.
    """
    asked, _ = doors.ADVISE.read(settings)
    given = [name for name in ("target", "bits", "speed") if getattr(asked, name) is not None]
    if len(given) != 1:
        came = f"{' and '.join(given)} are given" if given else "none is given"
        raise RecipeError(
            f"advise needs a single target, and {came}. Accepted: target='4GiB' (--target), bits=3.5 (--bits) or "
            "speed=1.5 (--speed)."
        )
    if asked.memory and asked.target is None:
        raise RecipeError(f"memory is of target, and {given[0]} is given. Give target, or leave memory out.")
    (kind,), value = given, float(getattr(asked, given[0]))
    source = bundled_if_none({"model": model})["model"]
    outline = read_outline(source, make_recipe(model=str(source)), asked.trust_remote_code)
    size = outline.size
    decoder = sum(layer.count * layer.parameters for layer in size.layers)
    operators = sum(layer.count * s.outputs * s.inputs for layer in size.layers for s in layer.stacks)
    dense = 16 * (decoder + size.fixed)

    def applied(way: Way) -> Advised:
        inside, rest = way.kept * operators, way.kept * (decoder - operators) + size.fixed
        arguments, of_operators, other = way.stored(outline.dtype)
        disk, memory = inside * of_operators + rest * other, inside * way.memory + rest * 16
        bits, faster = disk / (dense / 16), dense / memory
        nbytes = (memory if asked.memory else disk) / 8
        reached = {"target": nbytes <= value, "bits": bits <= value, "speed": faster >= value}
        place = shlex.quote(str(source))
        prune = f"convexprune prune {place} {arguments} --dataset TEXT --output DIR"
        then = f"convexprune {way.then} {'DIR' if arguments else place} OUT"
        commands = (*([prune] if arguments else []), *([then] if way.then else []))
        return Advised(way, int(disk / 8), int(memory / 8), bits, faster, reached[kind], commands)

    folder = Path(source)
    refused = _why_no_export(folder, outline)
    taken = [way for way in measured() if not (refused and way.then == "export")]
    ways = map(applied, [Way(AS_IT_IS, "", "", 16, 16, 1, 1, 1, ""), *taken])
    found = sorted(ways, key=lambda each: (not each.reaches, each.way.times, bool(each.commands), each.disk))
    words = {
        "target": f"{value / 1e6:,.2f} MB {'in memory' if asked.memory else 'on disk'}",
        "bits": f"{value} bits a weight on disk",
        "speed": f"{value} times the tokens a second at batch 1",
    }
    files, notes = file_sizes(folder, outline) if folder.is_dir() else ({}, [NO_FOLDER])
    return Advice(str(source), dense // 8, words[kind], tuple(found), files, (*notes, *refused))
