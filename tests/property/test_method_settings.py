"""Settings of methods are checked by type and range before any work, from Python, a recipe or a command line."""

from typing import Any

import pytest
from pruning_cases import correlated, layer_problem
from strategies import make_chain, random

from convexprune import errors
from convexprune.constraints import SemiStructured, Unstructured, parse_pattern
from convexprune.pruners import ADMM, PRUNERS, FISTAPruner
from convexprune.recipe import make_recipe
from convexprune.solvers import make_solver
from convexprune.validation._variants import make_variants

BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "text for a number": ("sparsegpt", {"damping": "abc"}, "SparseGPT: damping='abc': Input should be a valid number"),
    "not a number": ("sparsegpt", {"damping": float("nan")}, "damping=nan: Input should be a finite number"),
    "infinite": ("alps", {"rho": float("inf")}, "rho=inf: Input should be a finite number"),
    "negative": ("alps", {"damping": -0.1}, "damping=-0.1: Input should be greater than or equal to 0"),
    "a truth value": ("sparsegpt", {"damping": True}, "damping=True: Input should be a valid number"),
    "half a count": ("convex", {"rounds": 2.5}, "rounds=2.5: Input should be a valid integer"),
    "one end": ("convex", {"strengths": [0.1]}, r"strengths=\[0.1\]: Field required"),
    "the name of a solver": ("alps", {"refit": "cg"}, "refit='cg': Input should be an instance of AbstractSolver"),
    "no improvement": ("fistapruner", {"improvement": None}, "improvement=None: Input should be a valid number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_setting_of_the_wrong_type_or_out_of_range_is_refused(case: str):
    method, settings, message = BAD[case]
    for make in (PRUNERS[method], lambda **args: make_recipe(model="", method=method, method_args=args).build_pruner()):
        with pytest.raises(errors.RecipeError, match=message):
            make(**settings)


@pytest.mark.parametrize(
    "pruner",
    [ADMM(refit=make_solver("cg")), ADMM(refit=None, damping=0), ADMM(stiffnesses=(1, 2.5))],
)
def test_a_setting_of_its_type_is_taken(pruner: ADMM):
    assert pruner.prune(layer_problem(correlated(0), Unstructured(0.5))).weight.isfinite().all()


@pytest.mark.parametrize(
    "text",
    ["sparsegpt:damping=abc", "sparsegpt:damping=[", "sparsegpt:damping=-1", "fista:rounds=0", "descent:bits=3:beam=0"],
)
def test_a_comparison_refuses_them_before_any_work(text: str):
    with pytest.raises(errors.RecipeError, match="Input should be"):
        make_variants([text], [0.5], ["unstructured"], ["own"])


def test_a_comparison_names_the_settings_that_there_are():
    with pytest.raises(errors.RecipeError, match=r"'dampening'\. Did you mean 'damping'\? Known: block, damping\."):
        make_variants(["sparsegpt:dampening=0.1"], [0.5], ["unstructured"], ["own"])


def test_a_number_without_a_point_is_a_number():
    (variant,) = make_variants(["fistapruner:improvement=1e-6"], [0.5], ["unstructured"], ["own"])
    assert variant.layer_settings().pruner == FISTAPruner(improvement=1e-6)


# What is published


def test_fistapruner_goes_on_for_as_long_as_it_gains():
    """The paper has 1e-3 for LLaMA, and for OPT 1e-6, which is the default: it ends with a lower error."""
    assert FISTAPruner().improvement == 1e-6
    layer = make_chain(24, 48, 0, correlation=0.9, tokens=400)
    layer.pruned.mul_((2 * random(7, 48)).exp())
    problem = layer_problem(layer, Unstructured(0.5))
    pruned = [FISTAPruner(improvement=least, ratio=1.0).prune(problem) for least in (1e-2, 1e-3, 1e-4)]
    errors = [float(problem.squared_error(each.weight).sum()) for each in pruned]
    assert errors[0] > errors[1] > errors[2]
    assert len(pruned[0].solutions) < len(pruned[1].solutions) < len(pruned[2].solutions)


def test_both_warm_starts_of_fistapruner_are_rows_of_a_comparison():
    variants = make_variants(["fistapruner", "fistapruner:warm_start=wanda"], [0.5], ["unstructured"], ["own"])
    assert [v.name for v in variants] == ["fistapruner 0.5 dense", "fistapruner:warm_start=wanda 0.5 dense"]
    assert [v.layer_settings().pruner for v in variants] == [FISTAPruner(), FISTAPruner(warm_start="wanda")]


def test_wanda_has_a_quota_of_each_row_as_published_unless_another_is_named():
    def quotas(*args: Any, **settings: Any) -> dict[str, str]:
        return {v.name: str(v.recipe().build_pattern()) for v in make_variants(*args, **settings)}

    assert quotas(["wanda", "sparsegpt", "fista"], [0.5], ["unstructured", "2:4"], ["own"]) == {
        "wanda 0.5 pruned-own by row": "unstructured 50% per row",
        "wanda 2:4 pruned-own": "2:4",
        "sparsegpt 0.5 pruned-own": "unstructured 50% per matrix",
        "sparsegpt 2:4 pruned-own": "2:4",
        "fista 0.5 dense-layer rows": "unstructured 50% per matrix",
        "fista 2:4 dense-layer": "2:4",
    }
    methods = ["wanda:quota=matrix", "wanda:allocation=rows", "magnitude:quota=row"]
    assert quotas(methods, [0.5], ["unstructured"], ["own"]) == {
        "wanda 0.5 pruned-own": "unstructured 50% per matrix",
        "wanda 0.5 pruned-own rows": "unstructured 50% per matrix",
        "magnitude 0.5 dense-none by row": "unstructured 50% per row",
    }
    assert list(quotas(["wanda"], [0.5], ["unstructured"], ["dense"], "matrix")) == ["wanda 0.5 dense"]
    with pytest.raises(errors.RecipeError, match="Unknown quota 'rows'"):
        quotas(["wanda:quota=rows"], [0.5], ["unstructured"], ["own"])


# Patterns


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemiStructured(2.5, 4), "Pattern 2.5:4 is no pattern: .*whole numbers"),  # pyright: ignore
        (lambda: Unstructured("0.5"), "Sparsity '0.5' is no number"),  # pyright: ignore
        (lambda: parse_pattern(None), "Unknown pattern None"),  # pyright: ignore
        (lambda: parse_pattern("2:4", quota="row"), "Pattern 2:4 has a quota of its own"),
        (lambda: Unstructured(float("nan")), "Sparsity nan is outside"),
    ],
)
def test_what_is_no_pattern_is_refused(make: Any, message: str):
    with pytest.raises(errors.PatternError, match=message):
        make()
