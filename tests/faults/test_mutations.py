"""Planted faults: each must make a named test fail, so that the tests are known to see what they are there to see."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any
from unittest.mock import patch

import pytest
import test_baselines
import test_bound
import test_bounding
import test_certificate
import test_closing
import test_consistency
import test_doubt
import test_fista
import test_foreign_solvers
import test_gap
import test_group_lasso
import test_invariance
import test_massive_tokens
import test_moments
import test_osscar
import test_pattern
import test_penalties
import test_penalty
import test_permutation
import test_permute
import test_quadratic
import test_refit
import test_reverse_huber
import test_side_by_side
import torch
from hypothesis import Phase, settings

from convexprune import constraints
from convexprune._layerwise import capture as passes
from convexprune._layerwise.stages import CorrectionTargets, massive_token_weights
from convexprune._layerwise.steps import measure as bounding
from convexprune.adapters._channels import inner_channels
from convexprune.constraints import Stacked, _budget
from convexprune.core import (
    _bound as bound,
)
from convexprune.core import (
    _certificate as certificate,
)
from convexprune.core import (
    _consistency as consistency,
)
from convexprune.core import (
    _on_kept as on_kept,
)
from convexprune.core import (
    _penalty as penalty,
)
from convexprune.core import (
    _permutation as permutation,
)
from convexprune.core import (
    _relaxation as relaxation,
)
from convexprune.core._group_lasso import GroupLasso
from convexprune.core._moments import ErrorMoments, Moments
from convexprune.core._penalty import L1
from convexprune.core._quadratic import Quadratic
from convexprune.core._reverse_huber import ReverseHuber
from convexprune.core._side_by_side import SideBySide
from convexprune.core._sum_of_squares import SumOfSquares
from convexprune.pruners._baselines import osscar
from convexprune.pruners._baselines.scores import Wanda
from convexprune.solvers import Status
from convexprune.solvers import _cg as cg
from convexprune.solvers import _fista as fista
from convexprune.solvers._cg import ConjugateGradient
from convexprune.solvers._fista import FISTA
from convexprune.solvers._iterative import AbstractIterative

CAUGHT = (AssertionError, pytest.fail.Exception)  # the second: of an error that was to be raised; not what crashes


@dataclass(frozen=True)
class Fault:
    """`old` in the source of `place` is replaced by `new`; an assertion of `test` must fail then.

    Of its parameters that `arguments` do not have, pytest knows fixtures: of the same names, or as `fixtures` say.
    """

    name: str
    place: Callable[..., Any]
    old: str
    new: str
    test: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    fixtures: dict[str, str] = field(default_factory=dict)


FAULTS = (
    Fault("the sign of the gradient", Quadratic.residual, "alpha=-1", "alpha=1",
          test_quadratic.test_the_residual_is_minus_the_gradient_of_the_loss_on_the_tokens),
    Fault("the scale of the gradient", Quadratic.residual, "alpha=-1", "alpha=-2",
          test_quadratic.test_the_residual_is_minus_the_gradient_of_the_loss_on_the_tokens),
    Fault("half of the value lost", Quadratic.values, "/ 2", "/ 1",
          test_quadratic.test_values_are_the_loss_on_the_tokens),
    Fault("the anchor forgotten", Quadratic.displacement, "weight - self.anchor", "weight",
          test_moments.test_the_reconstruction_is_the_loss_on_the_tokens),
    Fault("a step of half the length", fista._gradient_step, "alpha=1 / lipschitz", "alpha=0.5 / lipschitz",
          test_fista.test_the_first_iterates_are_those_of_the_textbook, {"iterations": 2}),
    Fault("a step that is too long", FISTA._iterate, "lipschitz = q.lipschitz", "lipschitz = q.lipschitz / 2",
          test_fista.test_the_first_iterates_are_those_of_the_textbook, {"iterations": 2}),
    Fault("momentum off by one", fista._extrapolate, "(t - 1) / t_next", "t / t_next",
          test_fista.test_the_first_iterates_are_those_of_the_textbook, {"iterations": 3}),
    Fault("momentum that does not grow", fista._extrapolate, "1 + 4 * t.square()", "1 + 4 * t",
          test_fista.test_the_first_iterates_are_those_of_the_textbook, {"iterations": 3}),
    Fault("a prox with the step forgotten", L1.forward_backward, "like(step, weight)", "like(1.0, weight)",
          test_fista.test_the_first_iterates_are_those_of_the_textbook, {"iterations": 1}),
    Fault("a prox off by a factor", penalty._shrink, "value=-1", "value=-2",
          test_penalty.test_the_prox_is_the_scalar_one_entry_by_entry),
    Fault("a prox that does not clamp", penalty._shrink, ".clamp_min_(0)", "",
          test_penalty.test_the_prox_is_the_scalar_one_entry_by_entry),
    Fault("a strength that is not rescaled", L1.scaled, "self.strength / scale", "self.strength",
          test_penalty.test_a_scaled_penalty_is_the_same_function_of_the_scaled_weight),
    Fault("a reverse Huber prox with one branch", ReverseHuber.prox, "size.div_(1 + step * curvature)", "soft",
          test_reverse_huber.test_the_prox_minimises_its_objective),
    Fault("a reverse Huber conjugate without its price", ReverseHuber.conjugate, " - price", "",
          test_reverse_huber.test_fenchel_young_holds_and_is_an_equality_at_a_prox),
    Fault("a gap of coupled rows, each with a dual point of its own", certificate.row_gaps,
          "_least_sum if penalty.couples_rows else torch.minimum", "torch.minimum",
          test_group_lasso.test_all_rows_have_one_dual_point),
    Fault("a block shrinkage with the step forgotten", GroupLasso._shrinkage, "step * like", "like",
          test_group_lasso.test_the_prox_is_where_the_slope_vanishes),
    Fault("columns that go by their size alone", osscar.backward, "diagonal_blocks(inverse, block)",
          "torch.eye(block, dtype=gram.dtype).expand(len(kept), block, block)",
          test_osscar.test_columns_go_one_by_one_where_least_squares_misses_them_least, {"seed": 0, "block": 1}),
    Fault("blocks that count as their columns do", osscar.forms,
          "torch.linalg.solve_triangular(factors, sides, upper=False)",
          "sides / factors.diagonal(dim1=1, dim2=2)[..., None]",
          test_osscar.test_an_exchange_drops_what_costs_least_and_takes_what_gains_most,
          {"seed": 0, "block": 2, "blocks": {0, 2, 5, 7}}),
    Fault("a gap without the price of scaling", Quadratic.scaled_price, "(1 - scale).square() * (values", "0 * (values",
          test_certificate.test_no_known_solution_is_below_the_dual_bound),
    Fault("a gap without the price of clipping", certificate.row_gaps, "quadratic.inverse_form(residual - dual) + ", "",
          test_certificate.test_no_known_solution_is_below_the_dual_bound),
    Fault("a gap with half the price of a subgradient", certificate.row_gaps,
          "gaps, quadratic.inverse_form(residual - dual))", "gaps, 0.4 * quadratic.inverse_form(residual - dual))",
          test_certificate.test_without_a_penalty_the_gap_is_the_excess_itself),
    Fault("a step on what is kept for half its price", on_kept._least_squares, "y).sum(1) / 2", "y).sum(1) / 4",
          test_gap.test_least_squares_on_a_support_is_certified_on_fewer_tokens_than_inputs, {"tokens": 3}),
    Fault("a dual point that leaves the domain", on_kept.gaps_on_kept, ".clamp_max(1)", ".clamp_min(1).clamp_max(1)",
          test_gap.test_nor_where_least_squares_on_what_is_kept_leave_the_domain_elsewhere),
    Fault("a dual point whose errors lower its price", on_kept.gaps_on_kept, "(off, weight.abs())", "(0 * off, weight)",
          test_gap.test_nor_where_the_step_is_off_by_as_much_as_it_says),
    Fault("a dual point at no price", on_kept.gaps_on_kept, "+ s * (price.sqrt()", "+ 0 * (price",
          test_gap.test_a_bound_on_what_is_kept_is_never_too_small),
    Fault("a constant that is moved at no price", certificate._gaps_level, "+ s * price.sqrt()", "+ 0 * price",
          test_penalties.test_on_few_tokens_total_variation_is_proven_in_float64),
    Fault("no doubt about a Gram matrix that rounding made indefinite", SumOfSquares.doubt.fget,  # pyright: ignore[reportArgumentType]
          "self._cache.doubt = shift", "self._cache.doubt = 0.0",
          test_doubt.test_a_gap_on_a_support_covers_the_data_and_the_stored_tensors),
    Fault("any tensors are a sum of squares", consistency.is_sum_of_squares, "factor is not None and enough(factor)",
          "True", test_consistency.test_an_indefinite_gram_matrix_has_no_certificate, {"name": "fista"}),
    Fault("a certificate in the units of the inputs", Quadratic.unit_free.func, "power_of_two(self.scale().double())",
          "torch.ones_like(self.scale().double())",
          test_gap.test_the_units_of_the_inputs_do_not_make_an_answer_uncertain,
          {"name": "Support", "spread": 1e10}),
    Fault("a status that the certificate does not back", Status.of.__func__, "cls.UNCONFIRMED if", "said if",
          test_foreign_solvers.test_the_certificate_of_a_users_solver_is_ours),
    Fault("a gap without the penalty", certificate._certified, "problem.penalty.values(point)", "0 * point[:, 0]",
          test_certificate.test_the_bound_holds_near_the_solution_too),
    Fault("a KKT residual of nothing", certificate.proximal_steps, "residual / scale, length", "0 * residual, 0.0",
          test_certificate.test_the_kkt_residual_is_large_away_from_the_solution),
    Fault("a certificate from the residual at the start", AbstractIterative._solved,
          "problem.quadratic.residual(weight)", "residual",
          test_fista.test_a_certificate_does_not_trust_the_residual_at_the_start),
    Fault("a residual that follows a step the wrong way", Quadratic.residual_after, "sub(residual", "add(residual",
          test_fista.test_to_advance_is_to_solve_from_a_residual_that_is_known, {"iterations": 4, "scale": True}),
    Fault("an envelope priced as what it relaxes", Quadratic.inverse_form, " + torch.linalg.vecdot(gradient, gradient)",
          " + 0 * torch.linalg.vecdot(gradient, gradient)",
          test_quadratic.test_the_inverse_form_of_an_envelope_is_that_of_its_own_gram_matrix),
    Fault("bounds of another operator's rows", bounding._drawn, "first + drawn_rows", "drawn_rows",
          test_bounding.test_operators_that_share_an_input_have_the_bounds_that_each_has_alone,
          {"patterns": (constraints.Unstructured(0.5, "row"),) * 3, "rows": 2}),
    Fault("bounds by another operator's pattern", bounding._drawn, "(posed, patterns,",
          "(posed, patterns[:1] * len(patterns),",
          test_bounding.test_operators_that_share_an_input_have_the_bounds_that_each_has_alone,
          {"patterns": tuple(constraints.SemiStructured(kept, 4) for kept in (3, 1, 2)), "rows": 2}),
    Fault("a mask off by one", _budget.keep_largest, "missing = count", "missing = count + 1",
          test_pattern.test_a_mask_has_exactly_the_promised_zeros),
    Fault("a mask of the smallest", _budget.keep_largest, "above = scores > least", "above = scores < least",
          test_pattern.test_the_largest_of_the_matrix_are_kept_and_of_equals_the_first),
    Fault("a group that keeps one too few", constraints.SemiStructured.mask, "self.kept)", "self.kept - 1)",
          test_pattern.test_the_largest_of_every_group_are_kept_and_of_equals_the_first),
    Fault("X and X* swapped", ErrorMoments.add, "cross, error, x)", "cross, x, error)",
          test_moments.test_moments_are_means_over_the_tokens),
    Fault("x* - x in place of x - x*", Moments.add, "dense.reshape(x.shape).to(self.sum) - x.to(self.sum)",
          "x.to(self.sum) - dense.reshape(x.shape).to(self.sum)",
          test_moments.test_the_reconstruction_is_the_loss_on_the_tokens),
    Fault("a layer's error with the wrong sign", CorrectionTargets.of, "- output.float()", "+ output.float()",
          test_closing.test_its_error_is_that_of_the_layers_output,
          {"family": "llama", "prefix": "dense", "correction": 1.0}),
    Fault("a massive token", massive_token_weights, "(is_massive", "(~is_massive", test_massive_tokens.test_its_weight),
    Fault("an operator that closes a layer behind a norm", passes.is_last_branch,
          "torch.equal(last.output, call(layer.module, batch))", "True",
          test_closing.test_who_closes_a_layer_is_found, {"family": "gemma3_text", "settings": {}, "name": None}),
    Fault("a sum in place of a mean", Moments.gram.fget, "/ self.tokens", "/ 1",  # pyright: ignore
          test_moments.test_moments_are_means_over_the_tokens),
    Fault("a transposed cross term", ErrorMoments.project, "(weight, self.cross)", "(weight, self.cross.T)",
          test_moments.test_the_reconstruction_is_the_loss_on_the_tokens),
    Fault("tokens that depend on the batch", Moments.add, "self.tokens += x.shape[0]", "self.tokens += 1",
          test_invariance.test_how_the_tokens_are_split_into_batches),
    Fault("Wanda without its inputs", Wanda.prune, "problem.quadratic.gram.diagonal()", "None",
          test_baselines.test_wanda_is_its_formula_by_hand),
    Fault("a conjugate gradient that is steepest descent", cg._advance, "after / energy", "0 * energy",
          test_refit.test_as_many_iterations_as_inputs_are_enough_in_exact_arithmetic),
    Fault("a refit that walks through the null space", cg._advance, "~ends & ~(after <= least)", "energy >= 0",
          test_refit.test_on_fewer_tokens_than_inputs_it_ends_at_the_solution_nearest_to_the_start,
          {"dtype": torch.float32, "tokens": 14, "kept": 0.5}),
    Fault("a refit that leaves its support", cg._advance, "value=-1).mul_(mask)", "value=-1)",
          test_refit.test_nothing_outside_the_support_moves_from_zero),
    Fault("a refit that goes on beside others", ConjugateGradient.solve, "if any(done)", "if False",
          test_side_by_side.test_a_refit_ends_for_each_problem_where_it_would_end_alone),
    Fault("a refit that stops at once", ConjugateGradient._done, "self.tolerance", "1e9",
          test_refit.test_a_refit_stops_at_the_gap_that_it_promises_and_not_much_later),
    Fault("a bound that takes too few savings", bound.lower_bound, "(count - 1)", "(count - 2)",
          test_bound.test_no_pruning_is_better_than_the_bound),
    Fault("a bound that is twice the truth", bound.lower_bound, "bound if bound > 0", "2 * bound if bound > 0",
          test_bound.test_no_pruning_is_better_than_the_bound),
    Fault("a split that is not below the Gram matrix", relaxation.safe_split,
          "not is_below(gram, row * shrink)", "False",
          test_bound.test_a_split_that_is_too_large_is_shrunk_until_it_gives_a_bound),
    Fault("a price whose slope is that of all scores", relaxation._nearer, "(level == limited)", "1",
          test_bound.test_at_the_price_as_much_is_kept_as_may_be),
    Fault("a relaxation whose prox is off", relaxation._parted, "fraction / (1 + fraction)", "fraction",
          test_bound.test_the_relaxation_is_solved),
    Fault("a bound that forgets the damping", bounding._drawn,
          "damped(drawn.scaled(factors), damping)", "drawn.scaled(factors).quadratic",
          test_bounding.test_no_pruning_of_the_damped_problem_is_better_than_its_bound),
    Fault("columns put where they cost most", permutation._assigned, "maximize=True", "maximize=False",
          test_permutation.test_a_step_is_the_best_assignment),
    Fault("the threshold of what is kept", permutation._assigned, "budget.width - budget.kept", "budget.kept",
          test_permutation.test_a_step_is_the_best_assignment),
    Fault("channels that are not tried", inner_channels.same_in_another_order,
          "return close(before", "return True or close(before",
          test_permute.test_every_family_computes_what_it_did, {"family": "opt"}),
    Fault("doubled outputs that reach others", inner_channels._reached, "() if spread else", "",
          test_permute.test_every_family_computes_what_it_did, {"family": "llama"}),
    Fault("one Gram matrix for many problems", SideBySide.of, "each.gram for", "quadratics[0].gram for",
          test_side_by_side.test_a_quadratic_of_many_says_what_each_says),
    Fault("the units of the first for all", SideBySide._in_units, "anchor * scale", "anchor * scale[:1]",
          test_side_by_side.test_a_quadratic_of_many_says_what_each_says),
    Fault("sums of all", SideBySide.totals, "self.by_block(rows).sum(1)", "rows.sum().repeat(len(self.gram))",
          test_side_by_side.test_certificates_are_those_of_each),
    Fault("operators in a row that share a threshold", Stacked._runs, "(count, height)", "(1, -1)",
          test_side_by_side.test_masks_and_thresholds_of_operators_in_a_row_are_those_of_each),
)  # fmt: skip


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The fault in the code of the function itself, so that everyone who has imported it runs it."""
    function = inspect.unwrap(getattr(fault.place, "__func__", fault.place))  # of a classmethod, what is under it
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    assert fault.old in source, f"{fault.old!r} is no longer in {function.__qualname__}"
    source = source[source.index("def ") :].replace(fault.old, fault.new)  # without decorators
    names: dict[str, Any] = {}
    exec(compile(source, function.__code__.co_filename, "exec"), function.__globals__, names)
    original = function.__code__
    function.__code__ = names[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = original


@contextmanager
def unshrunk(test: Any) -> Iterator[None]:
    """Without the search for the smallest failing example, which takes most of the time of a failing test."""
    name = "_hypothesis_internal_use_settings"
    before = getattr(test, name, None)
    with nullcontext() if before is None else patch.object(test, name, settings(before, phases=[Phase.generate])):
        yield


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_makes_its_test_fail(fault):
    with planted(fault), unshrunk(fault.test), pytest.raises(CAUGHT):
        fault.test(**fault.arguments)


def test_the_fault_is_gone_afterwards():
    with planted(FAULTS[0]):
        pass
    test_quadratic.test_the_residual_is_minus_the_gradient_of_the_loss_on_the_tokens()
