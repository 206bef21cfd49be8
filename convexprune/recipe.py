"""The recipe: every setting of a run, checked before any work and saved beside the result."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from convexprune.constraints import Constraint, parse_pattern
from convexprune.errors import ConvexpruneError, RecipeError, shown, unknown
from convexprune.pipeline.passes import Correct
from convexprune.pipeline.settings import LayerSettings
from convexprune.pipeline.survey import check_rule
from convexprune.pruners import PRUNERS, AbstractPruner, Convex, Refitted, no_method
from convexprune.pruners.search import AbstractSearch
from convexprune.setting_types import make
from convexprune.solvers import AbstractSolver, solver_names

PRESETS = ("fistapruner",)
FAULTS = 5  # that one error tells
LARGEST_SEED = 2**63 - 1  # torch's generators take no more
SOLVERS = tuple(name for name in solver_names() if name != "cg")  # conjugate gradients take a fixed support only
PUBLISHED = {"prefix": "dense", "error_correction": 1.0, "correct": "operator"}  # of the preset


class Recipe(BaseModel):
    """What to prune, how, and on which tokens. Unknown settings are refused.

    `allocation` says how the zeros are spread over the operators and their rows (`convexprune.pipeline.survey.allot`);
    None is "rows" for methods that search a support where rows compete, else "uniform". `error_correction` in [0, 1]
    (true is 1): how much of the error that was made before it does an operator correct; None is 1 with a dense prefix,
    which errors of the operator's own decoder layer reach only, and 1/2 with a pruned one. `correct` says which error:
    of its own outputs (the "operator"), or, of the operator that closes a decoder layer, of the "layer"; None is the
    operator's for the method "fistapruner", as published, else the layer's. `prefix` says which network feeds a decoder
    layer: the "dense" one, so that layers are independent, or the one "pruned" so far. `held_out_samples` windows more
    are drawn, never fitted, and the errors on them reported; None is an eighth of the calibration samples, or what the
    data set has left. `damping` is the pull towards the dense weight, relative to the diagonal of the Gram matrix; None
    estimates it from the sampling noise of the calibration tokens. `threads` are those that a layer is pruned on, which
    decide the order of sums and so the last bits; None is what torch has, divided by the workers. `refit` adds least
    squares on the support to a method that has none of its own, or takes it from one that has (None: as the method is).
    `method_args` are settings of the pruner (see `convexprune.pruners`). `bound_rows` of every operator are compared in
    the report with what no pruning can beat; it changes no weight, and 0 leaves it out. `evaluation` is the text whose
    perplexity is reported, if any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str = "convex"
    solver: str = "fista"
    preset: str | None = None
    sparsity: float | None = None
    pattern: str = "unstructured"
    quota: Literal["matrix", "row"] = "matrix"
    allocation: str
    error_correction: float = Field(ge=0, le=1)
    correct: Correct
    prefix: Literal["dense", "pruned"] = "dense"
    damping: float | None = Field(None, ge=0)
    refit: bool | None = None
    method_args: dict[str, Any] = {}
    dataset: str = "self"
    num_calibration_samples: int = Field(128, ge=1)
    held_out_samples: int | None = Field(None, ge=0)
    max_seq_length: int | None = Field(None, ge=2)
    batch_size: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    bound_rows: int = Field(2, ge=0)
    evaluation: str | None = None
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    device: str = "auto"
    threads: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _convention(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The defaults that follow from other settings."""
        published = "fistapruner" in (given.get("preset"), given.get("method"))
        defaults = {
            "error_correction": 0.5 if given.get("prefix") == "pruned" else 1.0,
            "correct": "operator" if published else "layer",
            "allocation": _own_allocation(given),
        }
        return given | {name: value for name, value in defaults.items() if given.get(name) is None}

    @field_validator("error_correction", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return float(value) if isinstance(value, bool) else value

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        """torch's own objects by their names."""
        return str(value).removeprefix("torch.") if isinstance(value, torch.device | torch.dtype) else value

    @model_validator(mode="after")
    def _names(self) -> "Recipe":
        if self.method in solver_names() and self.method not in PRUNERS:
            raise RecipeError(
                f"{self.method!r} is a solver, not a method: leave the method out and name it as the solver "
                f"(--solver {self.method}). The baseline of arXiv 2408.03728 is the method 'fistapruner'."
            )
        if self.method not in PRUNERS:
            raise RecipeError(no_method(self.method))
        if self.preset is not None and self.preset not in PRESETS:
            raise RecipeError(unknown("preset", self.preset, PRESETS))
        for name, value in PUBLISHED.items() if self.preset else ():
            if getattr(self, name) != value:
                raise RecipeError(
                    f"preset={self.preset!r} is the algorithm as published, with {name}={value!r}, not "
                    f"{getattr(self, name)!r}. Leave {name} out, or take method={self.preset!r}, which has it as asked."
                )
        check_rule(self.allocation, self.build_pattern())
        return self

    def build_pattern(self) -> Constraint:
        """The pattern that `sparsity`, `pattern` and `quota` name.

        Raises:
            PatternError: they name none.
        """
        return parse_pattern(self.pattern, self.sparsity, self.quota)

    def layer_settings(
        self,
        pruner: AbstractPruner | None = None,
        patterns: Mapping[str, Constraint] | None = None,
        bound_rows: int = 0,
    ) -> LayerSettings:
        """How every layer is pruned; by `pruner` if the recipe's solver is a user's own."""
        return LayerSettings(
            pruner or self.build_pruner(),
            self.build_pattern(),
            self.error_correction,
            self.prefix,
            self.correct,
            patterns or {},
            bound_rows,
        )

    @property
    def spare_samples(self) -> int:
        """How many windows to hold out, if the data set has them."""
        return spare_samples(self.num_calibration_samples, self.held_out_samples)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """That of the model, if it is named."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    def build_pruner(self, solver: AbstractSolver | None = None) -> AbstractPruner:
        """The pruner that `preset`, `method` and `solver` name; `solver` may be a user's own.

        Raises:
            RecipeError: an unknown name, or settings that the method does not have.
        """
        if self.preset is not None and self.method != "convex":
            raise RecipeError(f"preset={self.preset!r} names its own method; leave method={self.method!r} out.")
        method = self.preset or self.method  # a preset is the method of that name
        own_refit = "refit" in signature(PRUNERS[method]).parameters
        added = bool(self.refit) and not own_refit
        settings: dict[str, Any] = {}
        if issubclass(PRUNERS[method], AbstractSearch):
            settings["damping"] = self.damping
        elif self.damping is not None and not added:
            raise RecipeError(
                f"damping belongs to methods that search a support, or to refit=True; {method!r} does not take it."
            )
        if method == "convex":
            settings["solver"] = self._solver() if solver is None else solver
        elif solver is not None or self.solver != "fista":
            raise RecipeError(f"solver belongs to method='convex'; {method!r} does not take it. Leave one of them out.")
        if self.refit is False and own_refit:
            settings["refit"] = None
        pruner = make(PRUNERS[method], method, settings | self.method_args)
        return Refitted(pruner, damping=self.damping) if added else pruner

    def _solver(self) -> AbstractSolver:
        if self.solver == "cg":
            raise RecipeError(f"solver='cg' solves for fixed supports only (refits). Known: {', '.join(SOLVERS)}.")
        if self.solver not in SOLVERS:
            raise RecipeError(unknown("solver", self.solver, SOLVERS))
        return Convex.solver_for(self.solver)


def _own_allocation(given: Mapping[str, Any]) -> str:
    """That of a method which searches a support is "rows" where the pattern allows it (`survey.check_rule`)."""
    pruner = PRUNERS.get(str(given.get("preset") or given.get("method", "convex")))
    whole = given.get("pattern", "unstructured") == "unstructured" and given.get("quota", "matrix") == "matrix"
    return "rows" if whole and pruner is not None and issubclass(pruner, AbstractSearch) else "uniform"


def spare_samples(num_calibration_samples: int, held_out_samples: int | None) -> int:
    """How many windows to hold out: as asked, or an eighth of those for calibration."""
    return max(1, num_calibration_samples // 8) if held_out_samples is None else held_out_samples


def make_recipe(**settings: Any) -> Recipe:
    """A recipe from keyword settings, with one readable error for all that is wrong.

    Raises:
        RecipeError: a setting is unknown or out of range.
        PatternError: sparsity and pattern name no pattern.
    """
    try:
        return Recipe(**settings)
    except ValidationError as error:
        causes = [fault.get("ctx", {}).get("error") for fault in error.errors()]
        if ours := [cause for cause in causes if isinstance(cause, ConvexpruneError)]:
            raise ours[0] from None  # it is ours and says it all
        raise RecipeError(" ".join(map(_told, error.errors()[:FAULTS]))) from error


def _told(fault: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in fault["loc"])[:100]
    if fault["type"] == "extra_forbidden":
        return unknown("setting", name, Recipe.model_fields)
    return f"{name}={shown(fault['input'])}: {fault['msg']}."
