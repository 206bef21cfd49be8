"""The settings for the layers of a run, and the weights of calibration tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from convexprune._device.precision import CertificateFormat, Format
from convexprune._layerwise.capture import ErrorTarget
from convexprune.constraints import Constraint
from convexprune.errors import RecipeError, unknown
from convexprune.pruners import AbstractPruner
from convexprune.quantizers import AbstractQuantizer, Descent

Stream = Literal["dense", "pruned"]
Emptied = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]


REFINED, WAYS = ("none", "layer", "half-layer"), ("adam", "gauss-newton")


@dataclass(frozen=True)
class Refinement:
    """The setting `refine`: the values that move together, all of a layer or first those of its attention; the way."""

    halves: bool
    way: str

    @classmethod
    def parse(cls, text: str) -> "Refinement | None":
        """Read "none", "layer", "half-layer" or "layer:gauss-newton"."""
        kind, colon, way = text.partition(":")
        if kind not in REFINED:
            raise RecipeError(unknown("refinement", kind, REFINED))
        if kind == "none" and not colon:
            return None
        if kind == "none" or (colon and way not in WAYS):
            raise RecipeError(f"refine={text!r}. Write none, layer or half-layer; or layer:{' or layer:'.join(WAYS)}.")
        return cls(kind == "half-layer", way or WAYS[0])


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """Settings for the layers of a run: pruner, pattern, inputs and targets.

    `prefix` names the network that feeds a decoder layer with x*: "dense", so that layers are independent
    (FISTAPruner), or "pruned", the earlier layers in their current state (SparseGPT, Wanda, ALPS). The target is W
    x* + a d with a = `correction`, where d = W (x - x*) is the operator's missing output, with x the input in the
    dense network (arXiv 2408.03728, section 3.3). If `error_target` is "residual_stream", not "operator", d is the
    missing output of the decoder layer, for the operator of its last residual branch (`capture.is_last_branch`):
    errors on all ways count.
    """

    pruner: AbstractPruner
    pattern: Constraint
    correction: float = 1.0  # a, the share of the error to correct, 0 to 1
    prefix: Stream = "dense"
    error_target: ErrorTarget = "operator"
    patterns: Mapping[str, Constraint] = field(default_factory=dict)  # by operator that differs
    bound_rows: int = 0  # per operator, compared with a lower bound; they change no weight
    row_weights: Mapping[str, Tensor] = field(default_factory=dict)  # weights of the outputs [m] by operator
    # the loss's need of column blocks by operator, if the loss chooses
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    # [windows length] by operator, of the calibration windows
    token_weights: Mapping[str, Tensor] = field(default_factory=dict)
    pruners: Mapping[str, AbstractPruner] = field(default_factory=dict)  # by operator that differs
    rules: Mapping[str, int] = field(default_factory=dict)  # numbers, from 1, of the recipe's rules, by operator
    gram_precision: Format = "auto"  # of second moments, see `_device.precision`
    solve_precision: Format = "auto"
    certificate_precision: CertificateFormat = "auto"
    quantizer: AbstractQuantizer = field(default_factory=Descent)
    refinement: Refinement | None = None  # after pruning
    emptied: Emptied | None = None  # returns a layer's parameters with zeros in place of removed parts

    def __post_init__(self) -> None:
        self.pruner.require(self.pattern)
        for name in {**self.patterns, **self.pruners}:
            self.pruner_of(name).require(self.pattern_of(name))

    def pruner_of(self, operator: str) -> AbstractPruner:
        return self.pruners.get(operator, self.pruner)

    def pattern_of(self, operator: str) -> Constraint:
        return self.patterns.get(operator, self.pattern)

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("dense",) if self.prefix == "dense" else ("dense", "pruned")

    def row_factors(self, operators: Sequence[str]) -> Tensor | None:
        """Return factors for the rows [m] of a stack of operators during pruning; None if rows count alike."""
        return torch.cat([self.row_weights[name] for name in operators]).sqrt() if self.row_weights else None


SHARES = {"none": 0.0, "attention_sink": 0.1, "loss": 0.5}
"""The share of each kind if none is given; of sinks a tenth has most of the gain of a half (lab/tried.md)."""
SINK = 4  # tokens at the start of a window on which attention rests (arXiv 2309.17453)


@dataclass(frozen=True)
class TokenWeighting:
    """A kind of token weights, and the `share` of all weight that the kind distributes; the rest is uniform."""

    kind: str
    share: float

    @classmethod
    def parse(cls, text: str) -> "TokenWeighting":
        """Read "none", "attention_sink" or "attention_sink:0.25"."""
        kind, colon, share = text.partition(":")
        if kind not in SHARES:
            raise RecipeError(unknown("token weighting", kind, SHARES))
        if not colon:
            return cls(kind, SHARES[kind])
        try:
            found = cls(kind, float(share))
        except ValueError:
            found = cls(kind, -1.0)
        if kind == "none" or not 0 <= found.share < 1:
            raise RecipeError(
                f"token_weights={text!r}. Write none, or a kind with a share in [0, 1), attention_sink:0.25."
            )
        return found


def loss_weights(squares: Tensor, share: float) -> Tensor:
    """Return weights, 1 on average, of which a `share` follows the squared gradients [windows length] of the tokens."""
    mean = squares.mean(dtype=torch.float64).float()
    return 1 - share + share * squares / mean if mean > 0 else torch.ones_like(squares)


def sink_weights(windows: int, length: int, share: float) -> Tensor:
    """Return weights [windows length], 1 on average, that give the first `SINK` tokens a `share` of the sum."""
    weights = torch.ones(length)
    if length > SINK:
        weights[:SINK] = share * length / SINK
        weights[SINK:] = (1 - share) * length / (length - SINK)
    return weights.expand(windows, length)
