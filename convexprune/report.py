"""What happened, per operator: plain data, as JSON and as a table."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from statistics import median
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune.core._damping import Damping
from convexprune.errors import OutputError

Number = int | float  # infinity and NaN are text in JSON
DERIVED = ("sparsity", "largest_gap", "median_bound_ratio", "short_of_tokens")  # written for readers, and not read


@dataclass(frozen=True)
class OperatorReport:
    """One operator after pruning; errors and counts are those of the weight as stored.

    Operators that share an input are solved as one problem, so they share its solves.

    The bound is for a sample of the operator's rows: no weight in the pattern has a smaller `error` there than `lower`,
    and `ratio` is lower / error. That error is the one the pruner minimises: the sum over the rows of mean |V x* -
    target|^2 and of its damping, whose strength is `damping`, each row times its weight if rows are weighed
    (`convexprune._layerwise.allocation.row_weights`).

    Args:
        name: in the model.
        outputs: m.
        inputs: n.
        zeros: how many of its weights are zero.
        expected_zeros: how many were asked for.
        pattern: that was asked for.
        relative_error: mean |V x* - target|^2 over mean |W x|^2 on the calibration tokens.
        held_out_error: the same on tokens that no method saw, the one to judge by; None if there are none.
        gap: the relative duality gap of the last solve (the refit); None if nothing convex was solved.
        largest_gap: of any certified solve. The path that chooses the support stops early on purpose.
        kkt_residual: of the last solve.
        status: of the last solve.
        solves: how many there were.
        products: matrix products [m n] x [n n].
        facts: other numbers of the method, by name, for the reader only.
        tokens: that the moments are means of.
        held_out_tokens: that the held-out error is a mean of.
        seconds: of the method.
        bound: see above; None if none was asked for, or the operator is too wide.
        dense_zeros: how many weights were zero before.
        damping: of the problem that was posed to the pruner; None if it has none.
        weighted_error: `relative_error` with the tokens' weights, which the method minimised; None if tokens count
            alike, as they do in the other errors.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    outputs: int
    inputs: int
    zeros: int
    expected_zeros: int
    pattern: str
    relative_error: float
    held_out_error: float | None
    gap: float | None
    largest_gap: float | None
    kkt_residual: float | None
    status: str | None
    solves: int
    products: int
    facts: dict[str, Number]
    tokens: int
    held_out_tokens: int
    seconds: float
    bound: dict[str, Number] | None = None
    dense_zeros: int = 0
    damping: Damping | None = None
    weighted_error: float | None = None

    @classmethod
    def read(cls, written: dict[str, Any]) -> "OperatorReport":
        """That of a dictionary which `asdict` wrote.

        Args:
            written: by the names of the fields; of an older report, too.

        Returns:
            The report.

        Raises:
            pydantic.ValidationError: a field is missing, or not what it should be.
        """
        return _reader().validate_python(written)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return self.zeros / (self.outputs * self.inputs)


def _with_typed_damping(operator: Any) -> Any:
    """An operator's record, in which older releases had the damping among the facts."""
    facts = operator.get("facts") if isinstance(operator, dict) else None
    if not isinstance(facts, dict) or "damping" in operator:
        return operator
    name = next((name for name in ("damping", "refit_damping") if name in facts), None)
    if name is None:
        return operator
    saturating = facts.get(f"{name}_saturating", 0.0)
    rest = {key: value for key, value in facts.items() if "damping" not in key}
    return operator | {"facts": rest, "damping": {"ridge": facts[name] - saturating, "saturating": saturating}}


_Written = Annotated[OperatorReport, BeforeValidator(_with_typed_damping)]
_reader = cache(lambda: TypeAdapter(_Written))
OnOperator = Callable[[OperatorReport], None]  # called with the report of each operator as it is done


@dataclass(repr=False)
class Report:
    """All operators of a run, its recipe, what was left alone and why, and where and how long it ran.

    Args:
        recipe: the settings by name.
        left_alone: by the name of each matrix that was not pruned: the reason.
        environment: machine, versions, folder.
        operators: one report for each.
        seconds: by phase.
        perplexity: before and after, with what it depends on.
        allocation: `cost` and `gap` of the allocation's rule (`convexprune._layerwise.allocation.ModelAllocation`).
        identity: the checksums and versions that the bits of the result depend on.
        files: the sha256 of every file of the result by its path, if it was written to a folder; of a packed file, of
            what it unpacks to.
        warnings: that the user was given.
        narrowed: if channels, heads, decoder layers or experts were removed for good: by the name of the setting in
            config.json how many there were and are, and so the `decoder_parameters` and all `parameters`. Of channels
            and heads `sparsity` is then the share of columns removed from the operators that read them.
        packed: if the result is a pack: bytes of its files `before` and `after`, and `bits` a weight.
        documents: the sha256 of the model card, by its path: it was made of the report, and people may change it.
        base: what the card of the base model says of its licence and language, and the names of its card and licence
            in the result, as "files".
        bytes: of the result's files, packed if it is a pack; None if it was not written.
        memory: the most bytes that this process held, since it began, as "process"; the largest of its workers, as
            "workers"; and on the GPU, as "gpu".
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    recipe: dict[str, Any]
    left_alone: dict[str, str]
    environment: dict[str, Any]
    operators: list[_Written] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    perplexity: dict[str, dict[str, Number]] = field(default_factory=dict)
    allocation: dict[str, Number | None] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    packed: dict[str, Number] | None = None
    narrowed: dict[str, list[int]] | None = None
    documents: dict[str, str] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    bytes: int | None = None
    memory: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        gap = "" if self.largest_gap is None else f", largest gap {self.largest_gap:.1e}"
        what = f"{self.recipe.get('method')} on {self.recipe.get('model')}"
        return f"Report({what}: {self.sparsity:.2%} zeros in {len(self.operators)} operators{gap})"

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in all pruned operators together."""
        return sum(o.zeros for o in self.operators) / max(1, sum(o.outputs * o.inputs for o in self.operators))

    @property
    def largest_gap(self) -> float | None:
        """The largest relative duality gap of any final solve; None if nothing convex was solved."""
        gaps = [o.gap for o in self.operators if o.gap is not None]
        return max(gaps) if gaps else None

    @property
    def median_bound_ratio(self) -> float | None:
        """The median over the operators of lower bound / error; None if no bound was asked."""
        ratios = [o.bound["ratio"] for o in self.operators if o.bound is not None]
        return median(ratios) if ratios else None

    @property
    def short_of_tokens(self) -> dict[str, int]:
        """The tokens of each expert that had fewer than it has inputs; its moments borrow those of others."""
        return {o.name: o.tokens for o in self.operators if "borrowed_tokens" in o.facts}

    @property
    def asks_for_zeros(self) -> bool:
        """Whether zeros were asked for: not if something was removed, nor on a grid, which has those of rounding."""
        return self.narrowed is None and any(o.expected_zeros for o in self.operators)

    @property
    def sparser_before(self) -> str | None:
        """A warning about operators that had more zeros than they were asked for; None if there are none."""
        those = [o for o in self.operators if o.dense_zeros > o.expected_zeros > 0]
        if not those:
            return None
        size = sum(o.outputs * o.inputs for o in those)
        names = ("dense_zeros", "expected_zeros", "zeros")
        before, asked, now = (sum(getattr(o, name) for o in those) / size for name in names)
        return (
            f"{len(those)} operators had more zeros before than they were asked for ({before:.1%}; asked {asked:.1%}, "
            f"now {now:.1%}): was the model pruned already? Ask for more zeros, or prune the dense model."
        )

    def to_json(self) -> str:
        """The whole report as JSON, with its checksum; numbers that are not finite are written as text."""
        whole = finite(asdict(self) | {name: getattr(self, name) for name in DERIVED})
        return json.dumps(whole | {"checksum": _checksum(whole)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, name: str = "The report") -> "Report":
        """The report that `to_json` wrote.

        Args:
            text: the JSON.
            name: what to call it in an error.

        Returns:
            The report.

        Raises:
            OutputError: the text is no report, or is not what was written.
        """
        try:
            whole = json.loads(text)
            if whole.pop("checksum") != _checksum(whole):
                raise ValueError("its checksum is that of another text")
            given = {key: value for key, value in whole.items() if key not in DERIVED}
            return _whole_reader().validate_python(given)
        except ValidationError as cause:
            fault = cause.errors()[0]
            reason = f"{'.'.join(map(str, fault['loc']))[:100]}: {fault['msg']}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
            reason = f"{type(cause).__name__}: {cause}"
        raise OutputError(f"{name} is damaged, or of another release of convexprune ({reason[:200]}).")

    def table(self) -> Table:
        """One line per operator, for a terminal."""
        table = Table(title=f"Sparsity {self.sparsity:.2%} in {len(self.operators)} operators", box=SIMPLE_HEAD)
        table.add_column("operator", no_wrap=True)
        for name in ("shape", "zeros", "error", "held-out", "gap", "bound", "solves", "damping", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        for o in self.operators:
            table.add_row(*_cells(o))
        return table


def _cells(o: OperatorReport) -> Iterable[str]:
    yield o.name
    yield f"{o.outputs}x{o.inputs}"
    yield f"{o.sparsity:.1%}"
    yield f"{o.relative_error:.2e}"
    yield "-" if o.held_out_error is None else f"{o.held_out_error:.2e}"
    yield "-" if o.gap is None else f"{o.gap:.0e}"
    yield "-" if o.bound is None else f"{o.bound['ratio']:.2f}"
    yield str(o.solves)
    yield "-" if o.damping is None else f"{o.damping.strength:.3f}"
    yield f"{o.seconds:.1f}"


def finite(value: Any) -> Any:
    """The same structure as `value` with inf and nan as text, because JSON has no numbers for them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


_whole_reader = cache(lambda: TypeAdapter(Report))
