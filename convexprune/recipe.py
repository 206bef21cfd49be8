"""The recipe: every setting of a run, checked before any work and saved beside the result."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from pydantic import model_validator

from convexprune._layerwise.allocation import check_rule
from convexprune._layerwise.settings import LayerSettings, Refinement, TokenWeighting
from convexprune._schema import settings as groups
from convexprune._schema.group import checked
from convexprune._schema.presets import deviations, intended, makes_types, require_preset
from convexprune._setting_types import make
from convexprune.constraints import (
    FAMILIES,
    Codebook,
    Coded,
    Constraint,
    Grid,
    Grouped,
    Quantized,
    make_grid,
    parse_pattern,
)
from convexprune.errors import RecipeError, unknown
from convexprune.pruners import METHODS, AbstractPruner, Convex, Refitted
from convexprune.pruners._base import WHOLE
from convexprune.pruners._search import AbstractSearch
from convexprune.quantizers import QUANTIZERS
from convexprune.solvers import AbstractSolver, solver_names

OTHERS = ("auto", "cg", "working-set")  # of a fixed support, or of few weights that are not zero
SOLVERS = tuple(name for name in solver_names() if name not in OTHERS)
ALPHAS = {"gptaq": 0.25, "qep": 0.5}  # the corrections of quantizers that are published with one


class Recipe(
    groups.DeviceSettings, groups.RunSettings, groups.MethodSettings, groups.TargetSettings, groups.DataSettings,
    groups.ModelSettings,
):  # fmt: skip
    """Settings that decide a result, named as in `prune` (docs/settings.md). The rest follows from these."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        return given | {name: value for name, value in _following(given).items() if given.get(name) is None}

    @model_validator(mode="after")
    def _names(self) -> "Recipe":
        if self.method in solver_names() and self.method not in METHODS:
            raise RecipeError(
                f"{self.method!r} is a solver, not a method: leave the method out and name it as the solver "
                f"(--solver {self.method}). The baseline of arXiv 2408.03728 is the method 'fistapruner'."
            )
        if self.method not in METHODS:
            raise RecipeError(unknown("method", self.method, METHODS))
        require_preset(self.preset, vars(self))
        TokenWeighting.parse(self.token_weights)
        if self.embedding_grid is not None and self.quantize in FAMILIES:
            raise RecipeError(
                f"embedding={self.embedding!r} beside quantize={self.quantize!r}, which chooses by a size. Leave "
                "embedding out."
            )
        pattern = self.build_pattern()
        grid = pattern.grid
        refines = Refinement.parse(self.refine) is not None
        if refines and grid is None and self.sparsity == 0 and not self.rules:
            raise RecipeError(f"refine={self.refine!r} repairs, and a sparsity of 0 breaks nothing. Leave refine out.")
        if refines and grid is not None and not isinstance(grid, Grid):
            raise RecipeError(
                f"refine={self.refine!r} moves the scales of whole numbers, int8 to int3, and {grid} is another grid. "
                "Leave refine out."
            )
        check_rule(self.allocation, pattern)
        if self.quantize in FAMILIES and self.allocation not in ("curve", "measured"):
            raise RecipeError(
                f"allocation={self.allocation!r} chooses no types for quantize={self.quantize!r}: 'curve', 'measured'."
            )
        if self.allocation == "columns" and not issubclass(METHODS[self.method], AbstractSearch):
            raise RecipeError(
                f"Allocation 'columns' chooses columns by the loss, and {self.method!r} has scores of its own. Leave "
                "the allocation out, or take method='convex'."
            )
        if pattern.removes and (self.targets != ("Linear",) or self.ignore):
            raise RecipeError(f"Pattern {self.pattern!r} finds its operators itself. Leave targets and ignore out.")
        if pattern.compensates and self.prefix != "pruned":
            raise RecipeError(
                f"Pattern {self.pattern!r} has the layers behind make up for what is gone, so that they have to see "
                "what is left. Leave prefix out."
            )
        if self.quantizer in ALPHAS and self.error_target != "operator":
            raise RecipeError(
                f"Quantizer {self.quantizer!r} corrects the errors of operators' inputs, and error_target="
                f"{self.error_target!r} is another error. Leave error_target out."
            )
        self._check_rules(pattern)
        return self

    @property
    def embedding_grid(self) -> Codebook | None:
        """The grid of embedding and head; None leaves them as they are."""
        return None if self.embedding is None else make_grid(self.embedding, self.group_size)

    @property
    def deviations(self) -> str | None:
        """Say which settings are not those of the preset, because they were given."""
        return deviations(self.preset, vars(self))

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the requested settings without defaults that follow from other settings."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        follows = _following(given)
        return {name: value for name, value in given.items() if name not in follows or value != follows[name]}

    def build_pattern(self) -> Constraint:
        """Return the constraint of `sparsity`, `pattern`, `quota`, `quantize`, `group_size` and `bits`."""
        return self._on_grid(parse_pattern(self.pattern, self.sparsity, self.quota))

    def _on_grid(self, support: Constraint) -> Constraint:
        if self.quantize in FAMILIES:
            if (self.target is None) == (self.bits is None):
                raise RecipeError(
                    f"quantize={self.quantize!r} takes a size: give target (900MB, say) or bits, one of them."
                )
            return Quantized(support, FAMILIES[self.quantize])
        if self.target is not None:
            known = " or ".join(map(repr, FAMILIES))
            raise RecipeError(f"target is the size of a file, and quantize is {self.quantize!r}. Take {known}.")
        if self.bits is not None and self.quantize is not None:
            raise RecipeError(f"bits={self.bits} is in place of quantize={self.quantize!r}: leave one of them out.")
        if self.bits is not None:
            return Quantized(support, Coded(self.bits))
        if self.quantize is None:
            return support
        grid = make_grid(self.quantize, self.group_size)
        is_read = isinstance(grid, Grouped) or isinstance(self.embedding_grid, Grouped)
        if self.group_size != type(self).model_fields["group_size"].default and not is_read:
            raise RecipeError(
                f"group_size={self.group_size} beside quantize={self.quantize!r}, whose groups are fixed. Leave "
                "group_size out, or take int8 to int3, nf4 or fp4."
            )
        return Quantized(support, grid)

    def layer_settings(
        self,
        pruner: AbstractPruner | None = None,
        patterns: Mapping[str, Constraint] | None = None,
        bound_rows: int = 0,
    ) -> LayerSettings:
        """Return the settings of a layer.

        Args:
            pruner: replaces the recipe's pruner; None keeps the recipe's.
            patterns: patterns by operator, where operators differ.
            bound_rows: rows of an operator for the lower bound.

        Returns:
            The settings.
        """
        return LayerSettings(
            pruner or self.build_pruner(),
            self.build_pattern(),
            self.error_correction,
            self.prefix,
            self.error_target,
            patterns or {},
            bound_rows,
            gram_precision=self.gram_precision,
            solve_precision=self.solve_precision,
            certificate_precision=self.certificate_precision,
            quantizer=make(QUANTIZERS[self.quantizer], self.quantizer, self.quantizer_args),
            refinement=Refinement.parse(self.refine),
        )

    def _check_rules(self, pattern: Constraint) -> None:
        """Refuse rules that contradict the rest."""
        own = [number for number, rule in enumerate(self.rules, 1) if (rule.sparsity, rule.pattern) != (None, None)]
        if own and self.allocation not in ("uniform", "rows"):
            raise RecipeError(
                f"Rule {own[0]} says what its operators get, and allocation={self.allocation!r} spreads zeros over "
                "all. Take allocation='uniform', or leave the sparsity and the pattern out of the rule."
            )
        patterns = [pattern, *(each for each, _ in self.build_rules())] if self.rules else []
        if removing := next((each.removes for each in patterns if each.removes), None):
            raise RecipeError(
                f"Pattern {removing!r} removes as much from all layers, or whole layers: no rule is about parts. Leave "
                "the rules out, or that pattern."
            )

    def build_rules(self) -> list[tuple[Constraint, AbstractPruner | None]]:
        """Return pattern and pruner (None without a method) of every rule, where the recipe has the defaults."""
        return [(self._pattern_of(rule), self._pruner_of(rule)) for rule in self.rules]

    def _pattern_of(self, rule: groups.Rule) -> Constraint:
        pattern = rule.pattern or self.pattern
        fixed = False
        if rule.pattern is not None and rule.sparsity is None:  # a pattern that says its share, or has one share only
            found = parse_pattern(pattern)
            fixed = not found.continuous or str(found) == pattern
        sparsity = rule.sparsity if rule.sparsity is not None or fixed else self.sparsity
        quota = self.quota if pattern.startswith("unstructured") else "matrix"
        return self._on_grid(parse_pattern(pattern, sparsity, quota))

    def _pruner_of(self, rule: groups.Rule) -> AbstractPruner | None:
        if rule.method is None:
            return None
        if rule.method not in METHODS:
            raise RecipeError(unknown("method", rule.method, METHODS))
        settings: dict[str, Any] = {"solver": self.solver} if rule.method == "convex" else {}
        if rule.method == self.method:
            settings["method_args"] = self.method_args
        if issubclass(METHODS[rule.method], AbstractSearch) or self.refit:
            settings["damping"] = self.damping
        return make_recipe(method=rule.method, refit=self.refit, **settings).build_pruner()

    @property
    def spare_samples(self) -> int:
        """Number of windows to hold out, if the data set has enough: as asked, or an eighth as many as calibrate."""
        return max(1, self.num_calibration_samples // 8) if self.held_out_samples is None else self.held_out_samples

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype of the model; None without a request."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    def build_pruner(self, solver: AbstractSolver | None = None) -> AbstractPruner:
        """Return the pruner of `method` and `solver`.

        Args:
            solver: a solver object of the user, or None.

        Returns:
            The pruner.

        Raises:
            RecipeError: unknown name, or settings that the method does not have.
        """
        method = self.method
        own_refit = "refit" in signature(METHODS[method]).parameters
        added = bool(self.refit) and not own_refit
        settings: dict[str, Any] = {}
        named = f"{method!r}, of preset {self.preset!r}," if self.preset else repr(method)
        if issubclass(METHODS[method], AbstractSearch):
            settings["damping"] = self.damping
        elif self.damping is not None and not added:
            raise RecipeError(
                f"damping belongs to methods that search a support, or to refit=True; {named} does not take it."
            )
        if method == "convex":
            settings["solver"] = self._solver() if solver is None else solver
        elif solver is not None or self.solver != "fista":
            raise RecipeError(f"solver belongs to method='convex'; {named} does not take it. Leave one of them out.")
        if self.refit is False and own_refit:
            settings["refit"] = None
        pruner = make(METHODS[method], method, settings | self.method_args)
        return Refitted(pruner, damping=self.damping) if added else pruner

    def _solver(self) -> AbstractSolver:
        if self.solver == "cg":
            raise RecipeError(f"solver='cg' solves for fixed supports only (refits). Known: {', '.join(SOLVERS)}.")
        if self.solver not in SOLVERS:
            raise RecipeError(unknown("solver", self.solver, SOLVERS))
        return Convex.solver_for(self.solver)


def _following(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return defaults that follow from others: rows compete where a method searches and `check_rule` allows it."""
    mixed, preset = makes_types(given), intended(given)
    codes = mixed or given.get("quantize") is not None
    given = preset | {name: value for name, value in given.items() if value is not None}
    published = given.get("method") == "fistapruner"
    pruner = METHODS.get(str(given.get("method", "convex")))
    whole = given.get("pattern", "unstructured") == "unstructured" and given.get("quota", "matrix") == "matrix"
    ours = pruner is not None and issubclass(pruner, AbstractSearch)
    searches = ours and given.get("sparsity") != 0
    alpha = ALPHAS.get(str(given.get("quantizer")))
    prefix = "pruned" if alpha or str(given.get("pattern")).startswith(tuple(WHOLE)) else "dense"
    channels = str(given.get("pattern")).startswith("channels")
    spread = "uniform" if not searches else "columns" if channels else "rows" if whole else "uniform"
    codes = codes and given.get("quantizer", "descent") == "descent"
    return {
        **({"quantize": "gguf"} if given.get("target") is not None else {}),
        **({"sparsity": 0.0} if mixed else {}),
        "token_weights": "attention_sink" if codes and ours and not published else "none",
        "prefix": prefix,
        "error_correction": alpha or (0.5 if (given.get("prefix") or prefix) == "pruned" else 1.0),
        "error_target": "operator" if published or alpha else "residual_stream",
        "allocation": "curve" if mixed or given.get("bits") is not None else spread,
        **preset,
    }


def make_recipe(**settings: Any) -> Recipe:
    """Return the recipe of `settings`, or raise a RecipeError or a PatternError that tells all that is wrong."""
    return checked(Recipe, settings)
