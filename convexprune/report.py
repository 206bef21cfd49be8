"""The record of a run: plain data by operator, as JSON and as a table."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from io import StringIO
from statistics import median
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from convexprune.errors import OutputError
from convexprune.pruners import Damping

Number = int | float  # infinity and NaN are text in JSON
DERIVED = ("sparsity", "largest_gap", "median_bound_ratio", "short_of_tokens")  # for readers; they follow from all else


@dataclass(frozen=True)
class OperatorReport:
    """The record of an operator after pruning. Errors and counts are of the stored weight.

    Operators with a common input are solved as one problem, so the record of the solve is common too.

    The bound holds for a sample of the operator's rows: every weight in the pattern has an `error` of at least `lower`
    there, and `ratio` is lower / error. This error is the pruner's objective: the sum over rows of mean |V x* -
    target|^2 plus the damping of strength `damping`, times the weight of the row (docs/method.md,
    "Which rows get the non-zeros").

    Args:
        name: name of the operator in the model.
        outputs: m.
        inputs: n.
        zeros: number of zero weights.
        expected_zeros: requested number of zeros.
        pattern: requested pattern.
        relative_error: mean |V x* - target|^2 over mean |W x|^2 on the calibration tokens; over mean |W x*|^2 with
            `error_correction=0` and for experts, where nothing of x is kept.
        held_out_error: the relative error on tokens that no method saw; None without such tokens.
        gap: relative duality gap of the last solve (the refit); None without a convex solve.
        largest_gap: largest gap of all certified solves. The path that chooses the support stops early on purpose.
        kkt_residual: KKT residual of the last solve.
        status: status of the last solve.
        solves: number of solves.
        products: number of matrix products [m n] x [n n].
        facts: further numbers of the method, for readers only.
        tokens: number of tokens in the moments.
        held_out_tokens: number of tokens in the held-out error.
        seconds: time of the method.
        bound: see above; None without a request or for wide operators.
        dense_zeros: number of zero weights before pruning.
        damping: damping of the layer problem; None without damping.
        weighted_error: `relative_error` with the tokens' weights, the method's objective; None if tokens count alike,
            as in the other errors.
        weight_growth: largest absolute weight over the dense operator's.
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
    weight_growth: float | None = None

    @classmethod
    def read(cls, written: dict[str, Any]) -> "OperatorReport":
        """Make a record of what `asdict` has `written`; pydantic refuses a field that is missing or malformed."""
        return _reader().validate_python(written)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return self.zeros / (self.outputs * self.inputs)


_reader = cache(lambda: TypeAdapter(OperatorReport))
OnOperator = Callable[[OperatorReport], None]  # called with the report of each operator as it is done


@dataclass(repr=False)
class Report:
    """The record of a run: operators, recipe, untouched matrices with reasons, machine and time.

    Args:
        recipe: settings by name.
        left_alone: reasons by name of untouched matrix.
        environment: machine, versions, folder.
        operators: records of the operators.
        seconds: time by phase.
        perplexity: before and after pruning, with text and window.
        allocation: of a rule with curves: `cost`, predicted nats per token, and `gap`, a bound on its decrease.
        identity: checksums and versions that decide the bits of the result.
        files: sha256 of every file of the result by path, if a folder was written; for a packed file, of the unpacked
            content.
        warnings: warnings of the run.
        narrowed: after the removal of channels, heads, decoder layers or experts: the numbers before and after by the
            name of the setting in config.json, and the numbers of `decoder_parameters` and of all `parameters`. For
            channels and heads `sparsity` is then the share of columns removed from the operators that read the
            channels.
        packed: for a pack: bytes of the files `before` and `after`, `bits` per weight, `operator_bits` of operators.
        documents: sha256 of the model card by path. People may edit the card.
        base: licence and language of the base model's card, and the names of card and licence in the result, as
            "files".
        bytes: size of the result's files, packed for a pack; None without files.
        ends: grids by name of embedding and head, if the recipe has put them on one.
        sized: of types chosen for a size: the `target` and the `bytes` of the exported file, `bits` a weight of the
            whole, type and bytes by operators as `tensors`, and the `metadata` of its header.
        memory: peak bytes of the process as "process", of the largest worker as "workers", and of the GPU as "gpu".
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    recipe: dict[str, Any]
    left_alone: dict[str, str]
    environment: dict[str, Any]
    operators: list[OperatorReport] = field(default_factory=list)
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
    sized: dict[str, Any] | None = None
    ends: dict[str, str] = field(default_factory=dict)

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
        """Tokens by expert, for experts with fewer tokens than inputs. Their moments borrow tokens of other experts."""
        return {o.name: o.tokens for o in self.operators if "borrowed_tokens" in o.facts}

    @property
    def asks_for_zeros(self) -> bool:
        """True if zeros were requested: not for removals, nor for grids with zeros by rounding."""
        return self.narrowed is None and any(o.expected_zeros for o in self.operators)

    @property
    def sparser_before(self) -> str | None:
        """Warning about operators with more zeros before pruning than requested; None without such operators."""
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
        """Return the report as JSON with a checksum. Numbers that are not finite become text."""
        whole = finite(asdict(self) | {name: getattr(self, name) for name in DERIVED})
        return json.dumps(whole | {"checksum": _checksum(whole)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, name: str = "The report") -> "Report":
        """Read a report written by `to_json`.

        Args:
            text: the JSON.
            name: name of the file in errors.

        Returns:
            The report.

        Raises:
            OutputError: the text is no report, or was changed.
        """
        try:
            whole = json.loads(text)
            if not isinstance(whole, dict) or whole.pop("checksum", None) != _checksum(whole):
                raise ValueError("its checksum is missing, or that of another text")
            said = {name: whole.pop(name) for name in DERIVED if name in whole}
            report = _whole_reader().validate_python(whole)
            if wrong := [name for name, value in said.items() if value != finite(getattr(report, name))]:
                raise ValueError(f"its {wrong[0]} is not that of its operators")
            return report
        except ValidationError as cause:
            fault = cause.errors()[0]
            reason = f"{'.'.join(map(str, fault['loc']))[:100]}: {fault['msg']}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
            reason = f"{type(cause).__name__}: {cause}"
        raise OutputError(
            f"{name} is damaged, or of another release of convexprune ({reason[:200]}). Put back what was written."
        )

    def _repr_html_(self) -> str:
        console = Console(record=True, file=StringIO(), width=160)
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Return the JSON Schema of `report.json`."""
        schema = _whole_reader().json_schema(schema_generator=_Schema)
        for name in DERIVED:
            getter = getattr(Report, name).fget
            of_type = TypeAdapter(getter.__annotations__["return"]).json_schema()
            schema["properties"][name] = of_type | {"description": getter.__doc__}
        schema["properties"]["checksum"] = {"type": "string", "description": "sha256 of all else."}
        return schema

    def table(self) -> Table:
        """Return a table for a terminal, a line for an operator."""
        table = Table(title=f"Sparsity {self.sparsity:.2%} in {len(self.operators)} operators", box=SIMPLE_HEAD)
        table.add_column("operator", no_wrap=True)
        for name in ("shape", "zeros", "error", "held-out", "growth", "gap", "bound", "solves", "damping", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        for o in self.operators:
            table.add_row(
                o.name,
                f"{o.outputs}x{o.inputs}",
                f"{o.sparsity:.1%}",
                f"{o.relative_error:.2e}",
                "-" if o.held_out_error is None else f"{o.held_out_error:.2e}",
                "-" if o.weight_growth is None else f"{o.weight_growth:.1f}",
                "-" if o.gap is None else f"{o.gap:.0e}",
                "-" if o.bound is None else f"{o.bound['ratio']:.2f}",
                str(o.solves),
                "-" if o.damping is None else f"{o.damping.strength:.3f}",
                f"{o.seconds:.1f}",
            )
        return table


class _Schema(GenerateJsonSchema):
    def float_schema(self, schema: Any) -> dict[str, Any]:
        """A number, or the text of one that is not finite."""
        return {"anyOf": [super().float_schema(schema), {"enum": ["inf", "-inf", "nan"]}]}


def finite(value: Any) -> Any:
    """Return the structure of `value` with inf and nan as text: JSON has no such numbers."""
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
