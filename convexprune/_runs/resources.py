"""How long a run takes on a GPU: by the rates of its number formats, of its memory and of its link to the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from convexprune._runs.cost import CORRECTING, FLOAT, JUDGING, correcting, work
from convexprune._runs.sizes import ModelSize, Setting, Stack

SOLVING = ("bfloat16", "float32", "float64", "memory", "launches")
SPLIT = 3  # products of bfloat16 that stand for one of float32 (bf16x3)
PARTS = 20.5  # and for one of float64, where that is slow: a certificate has 21 and twice 10 for 2 (`core._in_parts`)
CERTIFIED = 0.4  # of `cubes`: the factors of certificates
Seconds = dict[str, float]


class Needs(NamedTuple):
    """What a method needs for a stack [m n] beside its `sizes.Method`, counted (tests/unit/test_resources.py).

    Of the method's products `steps` are in bfloat16; the others are bf16x3. `precise` more are in float64 (a triangular
    solve is half a one), with n^3 operations times `cubes`. `passes` are reads and writes of a matrix [m n] of float32,
    where what can be fused is, and `squares` those of [n n]. `launches` are kernels that the host begins, and
    `by_column` more of them for each column. Of problems that are solved side by side each has `own` of them, and the
    others serve all.
    """

    steps: float
    precise: float
    cubes: float
    passes: float
    squares: float
    launches: float
    by_column: float = 0.0
    own: float = 0.0


REFIT = Needs(0, 2, 0.4, 900, 80, 750)
NEEDS = {
    "admm": Needs(64, 2, 0.4, 3000, 170, 5700, own=100),
    "alps": Needs(0, 2, 39, 1450, 130, 2000),
    "convex": Needs(60, 2, 0.4, 2200, 105, 1800, own=100),
    "fistapruner": Needs(0, 18, 0.4, 2850, 130, 2700),
    "magnitude": Needs(0, 0, 0, 17, 0, 60),
    "osscar": Needs(0, 7, 11, 1100, 375, 1500),
    "reap": Needs(0, 0, 0, 0, 0, 0),
    "sparsegpt": Needs(0, 0, 0, 400, 7, 200, 7.3),
    "shortgpt": Needs(0, 0, 0, 0, 0, 0),
    "wanda": Needs(0, 0, 0, 18, 0, 70),
    "wanda-sp": Needs(0, 0, 0, 15, 0, 20),
}
"""On layers like those of `sizes.METHODS`. A mask of a whole matrix is 8 passes and 40 kernels (`_device.select`).
SparseGPT sweeps over 128 columns at a time, each of which it reads 64 times on average."""
AROUND = 125
"""Launches to pose a problem, to store what is found, and to judge it (counted on two operators)."""
LAUNCH = 8e-6
"""Seconds in which the host begins a kernel, as is usual for torch; they cost nothing while the GPU takes longer."""


@dataclass(frozen=True)
class Card:
    """What a GPU does in a second.

    Args:
        float64: operations in products.
        float32: the same, without TF32.
        bfloat16: the same, with sums in float32.
        memory: bytes that are read or written.
        link: bytes between it and the host.
    """

    name: str
    float64: float
    float32: float
    bfloat16: float
    memory: float
    link: float

    @property
    def certifies_in_parts(self) -> bool:
        """Whether certificates are better made without float64 (`_device.capabilities.has_fast_doubles`)."""
        return self.float32 > 16 * self.float64


REACHED = 0.7
"""Of what a maker publishes, in large products and long copies."""
CARDS = (
    Card("H100 SXM", 67e12, 67e12, 989e12, 3.35e12, 64e9),
    Card("A100 SXM", 19.5e12, 19.5e12, 312e12, 2.04e12, 32e9),
    Card("RTX 4090", 1.29e12, 82.6e12, 165e12, 1.01e12, 32e9),
)
"""Peaks as published, without sparsity."""


def seconds_by_resource(model: ModelSize, setting: Setting, needs: Needs, card: Card) -> Mapping[str, Seconds]:
    """The time of each phase of a run, by what it is spent on; one after the other, though copies can be beside.

    Bounds of reports are not counted.
    """
    phases: dict[str, Seconds] = {"forward": {"bfloat16": work(model, setting).forward / card.bfloat16}}
    phases |= {"gram": {"bfloat16": 0.0}, "solve": dict.fromkeys(SOLVING, 0.0)}
    phases |= {"errors": {"float32": 0.0}, "copies": {"link": moved_bytes(model, setting) / card.link}}
    for layer in model.layers:
        for number, stage in enumerate(layer.stages):
            for stack in stage:
                together = setting.together(stack, stage)
                own = needs._replace(launches=AROUND + needs.own + (needs.launches - needs.own) / together)
                for phase, resource, seconds in _of(stack, setting, own, card, setting.corrects(number, stack)):
                    phases[phase][resource] += layer.count * seconds
    return phases


def _of(stack: Stack, setting: Setting, needs: Needs, card: Card, corrected: bool) -> list[tuple[str, str, float]]:
    m, n, method = float(stack.outputs), float(stack.inputs), setting.method
    whole, cube = 2 * m * n**2, n**3
    sums = setting.tokens * stack.share * (n**2 + (SPLIT * correcting(stack) if corrected else 0))
    coarse = whole * (needs.steps + SPLIT * max(0.0, method.products - needs.steps))
    in_parts, cubes = (needs.precise, min(needs.cubes, CERTIFIED)) if card.certifies_in_parts else (0.0, 0.0)
    solve = {
        "bfloat16": (coarse + PARTS * in_parts * whole) / card.bfloat16,
        "float32": (method.factorisations + cubes) * cube / card.float32,
        "float64": ((needs.precise - in_parts) * whole + (needs.cubes - cubes) * cube) / card.float64,
        "memory": FLOAT * (needs.passes * m * n + needs.squares * n**2) / card.memory,
    }
    begun = LAUNCH * (needs.launches + needs.by_column * n)
    return [
        ("gram", "bfloat16", sums / card.bfloat16),
        *(("solve", resource, seconds) for resource, seconds in solve.items()),
        ("solve", "launches", max(0.0, begun - sum(solve.values()))),
        ("errors", "float32", (JUDGING + CORRECTING * corrected) * whole / card.float32),
    ]


def moved_bytes(model: ModelSize, setting: Setting) -> float:
    """Bytes between host and device: weights, hidden states and recorded inputs, all of them there and back.

    Returns:
        The bytes of the whole run.
    """
    per_token = sum(
        layer.count * (model.hidden + sum(s.inputs for s in layer.stacks if s.token_aligned)) for layer in model.layers
    )
    weights = sum(layer.count * layer.parameters for layer in model.layers)
    return 2.0 * model.itemsize * (setting.tokens * per_token + weights)


def binding(phases: Mapping[str, Seconds]) -> str:
    """The resource that most of the time goes to.

    Args:
        phases: as `seconds_by_resource` gives them.
    """
    total: Seconds = {}
    for resource, seconds in (each for phase in phases.values() for each in phase.items()):
        total[resource] = total.get(resource, 0.0) + seconds
    return max(total, key=lambda name: total[name])


def needs_of(name: str, refit: bool) -> Needs:
    """The needs of a method."""
    own = NEEDS[name]
    return Needs(*(one + other for one, other in zip(own, REFIT, strict=True))) if refit else own


def published(card: Card) -> Card:
    """A card as fast as large products and long copies are on it."""
    rates = (card.float64, card.float32, card.bfloat16, card.memory, card.link)
    return Card(card.name, *(REACHED * rate for rate in rates))
