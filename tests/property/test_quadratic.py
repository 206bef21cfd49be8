import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import corrections, layers, make_layer, random, seeds, sizes

from convexprune import L1, Problem, certify
from convexprune._device.capabilities import MKLDNN_CHECKS, has_bfloat16
from convexprune.core._quadratic import Quadratic
from convexprune.errors import ProblemError

ROUNDING = 1e-12  # float64 at widths of at most 8, relative to the largest term
SOLVED = 1e-8  # a linear solve with a condition number up to 1e6 or so
TIGHT = 1.05  # an upper estimate of L any looser would cost iterations


def close(actual, expected, relative=ROUNDING):
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * max(1.0, float(expected.abs().max())))


@given(layers, corrections)
def test_values_are_the_loss_on_the_tokens(layer, correction):
    weight = layer.weight + random(0, *layer.weight.shape)
    expected = layer.loss(weight, correction)
    torch.testing.assert_close(layer.quadratic(correction).values(weight), expected, rtol=SOLVED, atol=1e-20)


@given(layers, corrections)
def test_the_residual_is_minus_the_gradient_of_the_loss_on_the_tokens(layer, correction):
    weight = (layer.weight + random(0, *layer.weight.shape)).requires_grad_()
    (gradient,) = torch.autograd.grad(layer.loss(weight, correction).sum(), weight)
    close(layer.quadratic(correction).residual(weight.detach()), -gradient)


@given(layers)
def test_least_squares_is_the_mean_squared_error(layer):
    weight = random(0, *layer.weight.shape)
    close(Quadratic.least_squares(layer.pruned, layer.targets()).values(weight), layer.loss(weight))


@given(layers, seeds)
def test_a_sum_of_quadratics_has_the_sum_of_their_values(layer, seed):
    m, n = layer.weight.shape
    other = make_layer("full rank", m, n, seed)
    first, second, weight = layer.quadratic(), other.quadratic(), random(1, m, n)
    close((first + second).values(weight), first.values(weight) + second.values(weight))


@given(layers, st.floats(0, 1e3))
def test_a_multiple_of_a_quadratic_has_the_multiple_of_its_values(layer, factor):
    quadratic, weight = layer.quadratic(), random(1, *layer.weight.shape)
    close((quadratic * factor).values(weight), factor * quadratic.values(weight))
    close((factor * quadratic).values(weight), factor * quadratic.values(weight))


def test_a_negative_multiple_is_refused():
    with pytest.raises(ProblemError, match="sum of squares"):
        _ = make_layer("full rank", 2, 3, seed=0).quadratic() * -1.0


@given(layers, st.booleans())
def test_a_quadratic_about_another_anchor_is_the_same_function(layer, zero):
    shape = layer.weight.shape
    quadratic, weight = layer.quadratic(), random(1, *shape)
    moved = quadratic.at(None if zero else random(2, *shape))
    close(moved.values(weight), quadratic.values(weight), SOLVED)
    close(moved.residual(weight), quadratic.residual(weight))


@given(layers, seeds)
def test_a_scaled_quadratic_is_the_same_function_of_the_scaled_weight(layer, seed):
    quadratic, weight = layer.quadratic(), random(1, *layer.weight.shape)
    scale = random(seed, layer.weight.shape[1]).exp()
    close(quadratic.scaled(scale).values(weight * scale), quadratic.values(weight))


@given(layers)
def test_the_scale_makes_a_unit_diagonal(layer):
    quadratic = layer.quadratic()
    diagonal = quadratic.scaled(quadratic.scale()).gram.diagonal()
    close(diagonal, torch.ones_like(diagonal))


@pytest.mark.parametrize("diagonal, scale", [([4.0, 0.0, 9.0], [2.0, 3.0, 3.0]), ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])])
def test_the_scale_of_a_dead_input_is_the_largest(diagonal, scale):
    quadratic = Quadratic(torch.diag(torch.tensor(diagonal)), torch.zeros(1, 3), torch.zeros(1))
    assert quadratic.scale().tolist() == scale


@given(sizes, sizes, seeds)
def test_damping_is_a_weighted_distance_from_its_anchor(m, n, seed):
    anchor, strength, weight = random(seed, m, n), random(seed + 1, n).abs(), random(seed + 2, m, n)
    expected = ((weight - anchor).square() * strength).sum(1) / 2
    close(Quadratic.damping(anchor, strength).values(weight), expected)


def test_negative_damping_is_refused():
    with pytest.raises(ProblemError, match="negative"):
        Quadratic.damping(torch.zeros(1, 2), torch.tensor([1.0, -0.1]))
    for strength in (torch.tensor(1.0), torch.ones(3), torch.ones(2, 2)):
        with pytest.raises(ProblemError, match="one for each input"):
            Quadratic.damping(torch.zeros(1, 2), strength)


def inner(quadratic, stiffness, weight):
    """argmin_U q(U) + stiffness/2 |U - V|^2 by the normal equations about the origin."""
    plain = quadratic.at(None)
    system = plain.gram + stiffness * torch.eye(len(plain.gram), dtype=weight.dtype)
    return torch.linalg.solve(system, (plain.cross + stiffness * weight).T).T


@given(st.builds(make_layer, st.sampled_from(("full rank", "rank deficient")), sizes, sizes, seeds), st.floats(0.1, 10))
def test_the_envelope_is_the_least_value_of_the_inner_problem(layer, stiffness):
    quadratic, weight = layer.quadratic(), random(1, *layer.weight.shape)
    best = inner(quadratic, stiffness, weight)
    expected = quadratic.values(best) + stiffness * (best - weight).square().sum(1) / 2
    close(quadratic.envelope(stiffness).values(weight), expected, SOLVED)


@given(st.builds(make_layer, st.sampled_from(("full rank", "rank deficient")), sizes, sizes, seeds), st.floats(0.1, 10))
def test_the_envelopes_residual_leads_to_the_inner_minimiser(layer, stiffness):
    quadratic, weight = layer.quadratic(), random(1, *layer.weight.shape)
    repaired = weight + quadratic.envelope(stiffness).residual(weight) / stiffness
    close(repaired, inner(quadratic, stiffness, weight), SOLVED)


@given(st.builds(make_layer, st.just("full rank"), sizes, sizes, seeds), st.floats(0.1, 10))
def test_the_inverse_form_of_an_envelope_is_that_of_its_own_gram_matrix(layer, stiffness):
    relaxed, slope = layer.quadratic().envelope(stiffness), random(1, *layer.weight.shape)
    plain = Quadratic(relaxed.gram, relaxed.cross, relaxed.energy)
    expected = (slope * torch.linalg.solve(plain.gram, slope.T).T).sum(1) / 2
    close(plain.inverse_form(slope), expected, SOLVED)
    close(relaxed.inverse_form(slope), expected, SOLVED)


def test_the_inverse_form_of_a_singular_matrix_is_infinite_but_at_zero():
    quadratic = Quadratic(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2))
    assert quadratic.inverse_form(torch.tensor([[0.0, 0.0], [1.0, 1.0]])).tolist() == [0.0, float("inf")]


@pytest.mark.parametrize("native", [True, False])
def test_the_residual_after_a_step_is_off_by_no_more_than_the_steps_rounding(monkeypatch, native):
    monkeypatch.setattr("convexprune.core._sum_of_squares.has_bfloat16", lambda device: native)
    layer = make_layer("full rank", 6, 40, 0)
    exactly = layer.quadratic()
    q = Quadratic(exactly.gram.float(), exactly.cross.float(), exactly.energy.float())
    weight, step = layer.weight.float(), random(1, *layer.weight.shape).float() / 100
    found, exact = q.residual_after(q.residual(weight), weight, weight + step), q.residual(weight + step)
    change = (step.abs() @ q.gram.abs()).max()  # of which bfloat16 rounds the factors and the sum
    rounding = 1e-6 * float(exact.abs().max())
    wrong = float((found - exact).abs().max())
    assert rounding < wrong <= 3 * 2**-9 * float(change) if native else wrong <= rounding
    assert found.dtype == torch.float32


def test_in_float64_a_residual_after_a_step_is_never_rough(monkeypatch):
    monkeypatch.setattr("convexprune.core._sum_of_squares.has_bfloat16", lambda device: True)
    layer = make_layer("full rank", 3, 6, 0)
    q, step = layer.quadratic(), random(1, *layer.weight.shape)
    found = q.residual_after(q.residual(layer.weight), layer.weight, layer.weight + step)
    close(found, q.residual(layer.weight + step), SOLVED)


@pytest.mark.parametrize(
    ("device", "capability", "instructions", "expected"),
    [
        ("cpu", None, {"avx512_bf16": True}, True),
        ("cpu", None, {"avx512_bf16": True, "denied": True}, False),
        ("cpu", None, {"amx_bf16": True, "avx512_bf16": False}, True),
        ("cpu", None, {"avx512_f": True}, False),
        ("cuda", (8, 0), {}, True),
        ("cuda", (7, 5), {"avx512_bf16": True}, False),
        ("mps", None, {}, False),
    ],
)
def test_bfloat16_is_used_where_the_device_has_it(monkeypatch, device, capability, instructions, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    denied = "denied" in instructions  # by ONEDNN_MAX_CPU_ISA
    monkeypatch.setattr(torch.ops.mkldnn, MKLDNN_CHECKS[torch.bfloat16], lambda: not denied, raising=False)
    assert has_bfloat16(torch.device(device)) is expected


def test_the_envelope_refuses_a_matrix_that_is_no_gram_matrix():
    quadratic = Quadratic(torch.tensor([[-5.0]]), torch.zeros(1, 1), torch.zeros(1), checked=False)
    with pytest.raises(ProblemError, match="no Gram matrix"):
        quadratic.envelope(1.0)


@given(layers)
def test_the_factor_of_a_float32_gram_is_never_above_it(layer):
    # Seen from float64, so that the check's own rounding is a billion times smaller than the factor's.
    gram = layer.quadratic().gram.float()
    factor = Quadratic(gram, torch.zeros(1, len(gram)), torch.zeros(1)).factor
    if factor is not None:
        rest = gram.double() - factor.double() @ factor.double().T
        assert float(torch.linalg.eigvalsh(rest).min()) >= -ROUNDING * float(gram.diagonal().max())


def test_a_singular_gram_has_no_factor():
    assert make_layer("rank deficient", 1, 8, seed=0).quadratic().factor is None


def test_a_well_conditioned_gram_has_a_factor():
    assert make_layer("full rank", 1, 8, seed=0).quadratic().factor is not None


@given(layers)
def test_the_lipschitz_estimate_is_above_the_largest_eigenvalue_and_near_it(layer):
    quadratic = layer.quadratic()
    largest = float(torch.linalg.eigvalsh(quadratic.gram).max())
    assert largest * (1 - ROUNDING) <= quadratic.lipschitz <= TIGHT * largest


@given(st.builds(make_layer, st.sampled_from(("full rank", "rank deficient")), sizes, sizes, seeds), st.floats(0.1, 10))
def test_the_lipschitz_estimate_holds_for_an_envelope_and_what_is_made_of_it(layer, stiffness):
    envelope = layer.quadratic().envelope(stiffness)
    scale = random(0, layer.weight.shape[1]).exp()
    made = (envelope, envelope * 3.0, envelope + layer.quadratic(), envelope.scaled(scale), envelope.at(None))
    for quadratic in (*made, *(q.double for q in made)):
        assert quadratic.lipschitz >= float(torch.linalg.eigvalsh(quadratic.gram).max()) * (1 - ROUNDING)


def test_the_lipschitz_estimate_sees_an_eigenvector_of_mixed_signs():
    # The largest eigenvalue, 1.5, belongs to (1, -1), which is orthogonal to every vector of row sums.
    gram = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    assert Quadratic(gram, torch.zeros(1, 2), torch.zeros(1)).lipschitz >= 1.5


@given(st.integers(2, 8), st.integers(0, 2**16))
def test_the_lipschitz_estimate_holds_where_eigenvalues_crowd(n, seed):
    basis = torch.linalg.qr(random(seed, n, n)).Q
    gram = basis * torch.linspace(0.95, 1, n, dtype=torch.float64) @ basis.T
    gram = (gram + gram.T) / 2
    lipschitz = Quadratic(gram, torch.zeros(1, n, dtype=gram.dtype), torch.zeros(1, dtype=gram.dtype)).lipschitz
    assert 1 <= lipschitz <= TIGHT


def test_double_is_the_same_function_in_float64():
    layer = make_layer("full rank", 2, 3, seed=0)
    quadratic = layer.quadratic()
    single = Quadratic(quadratic.gram.float(), quadratic.cross.float(), quadratic.energy.float(), layer.weight.float())
    assert single.double.gram.dtype == torch.float64
    close(single.double.values(layer.weight * 2), quadratic.values(layer.weight * 2), 1e-6)  # float32 data


def test_what_is_made_of_a_quadratic_has_its_rounding_errors_and_its_arrays():
    layer = make_layer("full rank", 2, 3, seed=0)
    exact = layer.quadratic().at(None)
    single = Quadratic(exact.gram.float(), exact.cross.float(), exact.energy.float()).double
    least = 4 * torch.finfo(torch.float32).eps / 2 * exact.energy
    for made, factor in ((single + exact, 2), (exact + single, 2), (3 * single, 3), (single, 1)):
        assert bool((made.rounding >= 0.99 * factor * least).all())
    flat = Quadratic.least_squares(layer.pruned.float().numpy(), layer.targets()[:, 0].float().numpy())
    assert flat.data == flat.double.data is not None


def test_about_an_anchor_far_away_the_resolution_is_that_of_the_energy_there():
    quadratic = make_layer("full rank", 2, 3, seed=0).quadratic()
    far = quadratic.at(1e6 * random(0, 2, 3))
    assert bool((far.rounding >= 4 * torch.finfo(torch.float64).eps / 2 * far.energy).all())


def test_sums_and_multiples_of_what_was_written_about_an_anchor_keep_its_rounding_errors():
    weight, strength = random(1, 2, 6).float(), torch.full((6,), 1e-9)
    x = random(0, 40, 6).float()
    stored = Quadratic.least_squares(x, x @ weight.T)
    damping = Quadratic.damping(weight, strength)
    gap = certify(Problem(stored, L1(1e-12)), weight).gap
    for made in (1.0 * stored.at(weight), damping + stored, damping + 0.5 * stored + 0.5 * stored.at(weight)):
        assert certify(Problem(made, L1(1e-12)), weight).gap >= 0.99 * gap


@pytest.mark.parametrize(
    ("name", "tensors"),
    {
        "gram": (torch.zeros(2, 2), torch.zeros(1, 3), torch.zeros(1), None),
        "energy": (torch.zeros(3, 3), torch.zeros(1, 3), torch.zeros(2), None),
        "anchor": (torch.zeros(3, 3), torch.zeros(1, 3), torch.zeros(1), torch.zeros(3, 1)),
        "cross": (torch.zeros(3, 3), torch.zeros(1, 1, 3), torch.zeros(1), None),
    }.items(),
)
def test_tensors_that_do_not_fit_are_refused_by_name(name, tensors):
    with pytest.raises(ProblemError, match=f"`{name}`"):
        Quadratic(*tensors)


def test_integers_are_refused():
    with pytest.raises(ProblemError, match="floating point"):
        Quadratic(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1))
