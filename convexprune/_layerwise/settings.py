"""The settings by which every layer of a run is pruned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from convexprune._device.precision import CertificateFormat, Format
from convexprune._layerwise.capture import ErrorTarget
from convexprune.constraints import Constraint
from convexprune.pruners import AbstractPruner
from convexprune.quantizers import AbstractQuantizer, Descent

Stream = Literal["dense", "pruned"]
Emptied = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """How every layer of a run is pruned: by what, to what, and what its operators see and aim at.

    `prefix` says which network feeds a decoder layer with x*: "dense", so that layers are independent of each other
    (FISTAPruner), or "pruned", the layers before it as they are by now (SparseGPT, Wanda, ALPS). The target is
    W x* + a d with a = `correction`, where d = W (x - x*) is what the operator's outputs lack, with x what it sees in
    the dense network (arXiv 2408.03728, section 3.3). If `error_target` is "residual_stream", not
    "operator", d is what the outputs of the decoder layer lack, for the operator that is its last residual branch
    (`capture.is_last_branch`): what reached them by other ways, too.
    `patterns` and `pruners` hold operators that differ in these, `rules` the rule of the recipe that says so.
    `bound_rows` of every operator are compared with what no pruning can beat; it changes no weight. `row_weights` say
    how the outputs [m] of every operator count, if not alike; `columns` how much a model's loss needs each block of
    columns, if these are chosen by that; `token_weights` how the calibration tokens of an operator count, if not alike.

    Args:
        pattern: what every operator is pruned to.
        correction: a, how much of the error is corrected, 0 to 1.
        patterns: of operators that differ in theirs, by name.
        bound_rows: rows of each operator to bound.
        row_weights: [m] by the name of the operator.
        columns: [blocks] by the name of the operator.
        token_weights: [windows length] by the name of the operator, for the calibration windows.
        pruners: of operators that differ in theirs, by name.
        rules: numbers, from 1, of the rules of the recipe, by the names of operators.
        gram_precision: the format in which second moments are added up, see `_device.precision`.
        solve_precision: that of the products of solves.
        quantizer: puts what is kept on the grids of the patterns.
        emptied: what a decoder layer has in place of what is removed of it, by its name and its parameters: zeros;
            None: nothing is removed.
    """

    pruner: AbstractPruner
    pattern: Constraint
    correction: float = 1.0
    prefix: Stream = "dense"
    error_target: ErrorTarget = "operator"
    patterns: Mapping[str, Constraint] = field(default_factory=dict)
    bound_rows: int = 0
    row_weights: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    token_weights: Mapping[str, Tensor] = field(default_factory=dict)
    pruners: Mapping[str, AbstractPruner] = field(default_factory=dict)
    rules: Mapping[str, int] = field(default_factory=dict)
    gram_precision: Format = "auto"
    solve_precision: Format = "auto"
    certificate_precision: CertificateFormat = "auto"
    quantizer: AbstractQuantizer = field(default_factory=Descent)
    emptied: Emptied | None = None

    def __post_init__(self) -> None:
        self.pruner.require(self.pattern)
        for name in {**self.patterns, **self.pruners}:
            self.pruner_of(name).require(self.pattern_of(name))

    def pruner_of(self, operator: str) -> AbstractPruner:
        """What prunes the operator "layer.operator": its own in `pruners`, else that of all."""
        return self.pruners.get(operator, self.pruner)

    def pattern_of(self, operator: str) -> Constraint:
        """The pattern of the operator "layer.operator": its own in `patterns`, else that of all."""
        return self.patterns.get(operator, self.pattern)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The networks of which a run has to know what enters a layer."""
        return ("dense",) if self.prefix == "dense" else ("dense", "pruned")

    def row_factors(self, operators: Sequence[str]) -> Tensor | None:
        """What the rows [m] of a stack of operators are multiplied by while it is pruned; None if all count alike.

        Returns:
            Factors [m], or None.
        """
        return torch.cat([self.row_weights[name] for name in operators]).sqrt() if self.row_weights else None
