import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import corrections, layers, make_layer, random, seeds

from convexprune.constraints import Unstructured
from convexprune.core._moments import Moments, burstiness, sampling_noise
from convexprune.errors import ProblemError
from convexprune.pruners import LayerProblem

ROUNDING = 1e-12  # float64 sums of a few dozen tokens, relative to the largest entry
SINGLE = 1e-5  # the same in float32


def close(actual, expected, relative=ROUNDING):
    assert (actual is None) == (expected is None)
    if actual is not None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=relative * max(float(expected.abs().max()), 1e-300))


def assert_same(first, second, relative=ROUNDING):
    assert first.tokens == second.tokens
    for name in ("gram", "cross", "change"):
        close(getattr(first, name), getattr(second, name), relative)


def test_no_inputs_have_no_moments():
    moments = Moments(0, torch.float64)
    moments.add(torch.zeros(2, 3, 0))
    assert moments.tokens == 6 and moments.gram.shape == (0, 0)


@given(layers)
def test_moments_are_means_over_the_tokens(layer):
    x, change, moments = layer.pruned, layer.dense - layer.pruned, layer.moments
    close(moments.gram, x.T @ x / len(x))
    if layer.dense is not layer.pruned:
        close(moments.cross, change.T @ x / len(x))
        close(moments.change, change.T @ change / len(x))


@given(layers, seeds)
def test_a_token_of_weight_k_counts_as_k_equal_tokens(layer, seed):
    weights = torch.randint(0, 4, (len(layer.pruned),), generator=torch.Generator().manual_seed(seed))
    weights[0] += 1  # one token is left at least
    dense = None if layer.dense is layer.pruned else layer.dense
    given, repeated = Moments(layer.weight.shape[1], torch.float64), Moments(layer.weight.shape[1], torch.float64)
    given.add(layer.pruned, dense, weights.double())
    repeated.add(
        layer.pruned.repeat_interleave(weights, 0), None if dense is None else dense.repeat_interleave(weights, 0)
    )
    assert_same(given, repeated, 1e-11)


@given(layers)
def test_with_weights_of_one_the_bits_are_those_without(layer):
    ones = Moments(layer.weight.shape[1], torch.float64)
    ones.add(layer.pruned, None if layer.dense is layer.pruned else layer.dense, torch.ones(len(layer.pruned)))
    assert_same(ones, layer.moments, 0)


@given(layers, corrections, seeds)
def test_the_reconstruction_weighs_the_losses_of_tokens(layer, correction, seed):
    weights, weight = random(seed, len(layer.pruned)).exp(), random(seed + 1, *layer.weight.shape)
    for outputs in (None, len(layer.weight)):
        moments = Moments(layer.weight.shape[1], torch.float64, outputs=outputs)
        moments.add(layer.pruned, weights=weights)
        change = layer.dense - layer.pruned
        moments.add_errors(layer.pruned, change if outputs is None else change @ layer.weight.T, weights)
        errors = (layer.pruned @ weight.T - layer.targets(correction)).square() / 2
        expected = (weights[:, None] * errors).sum(0) / weights.sum()
        values = moments.reconstruction(layer.weight, correction).values(weight)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-20)


def test_weights_of_other_tokens_are_refused():
    with pytest.raises(ProblemError, match="one for each token"):
        Moments(3).add(torch.zeros(5, 3), weights=torch.ones(4))


def test_equal_inputs_have_no_change():
    moments = make_layer("full rank", 1, 3, seed=0, change=0).moments
    assert moments.cross is None
    assert moments.change is None


@given(layers, st.lists(st.integers(1, 7), max_size=5))
def test_any_split_into_batches_gives_the_same_moments(layer, batches):
    moments, at = Moments(layer.weight.shape[1], torch.float64), 0
    for size in [*batches, len(layer.pruned)]:
        part = slice(at, at + size)
        moments.add(layer.pruned[part], None if layer.dense is layer.pruned else layer.dense[part])
        at += size
    assert_same(moments, layer.moments)


def test_a_batch_of_sequences_counts_every_token():
    layer = make_layer("full rank", 2, 3, seed=0, tokens=24)
    moments = Moments(3, torch.float64)
    moments.add(layer.pruned.view(2, 12, 3), layer.dense.view(2, 12, 3))
    assert_same(moments, layer.moments)


def test_batches_without_a_change_count_as_unchanged():
    layer = make_layer("full rank", 2, 3, seed=0)
    some = Moments(3, torch.float64)
    some.add(layer.pruned)
    some.add(layer.pruned, layer.dense)
    every = Moments(3, torch.float64)
    every.add(layer.pruned, layer.pruned)
    every.add(layer.pruned, layer.dense)
    assert_same(some, every)


@given(layers, st.integers(0, 30))
def test_the_sum_of_folds_is_the_whole(layer, at):
    folds = Moments(layer.weight.shape[1], torch.float64), Moments(layer.weight.shape[1], torch.float64)
    for fold, part in zip(folds, (slice(None, at), slice(at, None)), strict=True):
        fold.add(layer.pruned[part], None if layer.dense is layer.pruned else layer.dense[part])
    assert_same(folds[0] + folds[1], layer.moments)


@given(layers)
def test_the_energy_is_that_of_the_dense_output(layer):
    expected = (layer.dense @ layer.weight.T).square().mean(0)
    torch.testing.assert_close(layer.moments.energy(layer.weight), expected, rtol=1e-9, atol=0)


@given(layers, corrections, seeds)
def test_the_reconstruction_is_the_loss_on_the_tokens(layer, correction, seed):
    weight = random(seed, *layer.weight.shape)
    quadratic = layer.moments.reconstruction(layer.weight, correction)
    torch.testing.assert_close(quadratic.values(weight), layer.loss(weight, correction), rtol=1e-9, atol=1e-20)


def test_the_dtype_is_that_of_the_accumulation_not_of_the_tokens():
    layer = make_layer("full rank", 2, 3, seed=0)
    for dtype, relative in ((torch.float64, SINGLE), (torch.float32, SINGLE)):
        moments = Moments(3, dtype)
        moments.add(layer.pruned.float(), layer.dense.float())
        assert moments.gram.dtype == dtype
        close(moments.gram.double(), layer.moments.gram, relative)


def test_float64_sums_what_float32_loses():
    # A million added once and then ones: float32 stops at 2^24 and forgets the ones.
    tokens = torch.ones(64, 1)
    sums = {}
    for dtype in (torch.float32, torch.float64):
        moments = Moments(1, dtype)
        moments.add(torch.full((1, 1), 2.0**14))
        for token in tokens:
            moments.add(token[None])
        sums[dtype] = float(moments.gram * moments.tokens)
    assert sums[torch.float64] == pytest.approx(2.0**28 + 64, abs=1e-6)
    assert abs(sums[torch.float32] - (2.0**28 + 64)) > 1


def test_moments_without_tokens_are_refused():
    with pytest.raises(ProblemError, match="no token"):
        Moments(3).reconstruction(torch.zeros(2, 3))


@pytest.mark.parametrize(("pruned", "dense"), [((5, 2), None), ((5, 3), (4, 3))])
def test_inputs_of_another_shape_are_refused(pruned, dense):
    with pytest.raises(ProblemError, match="3 wide"):
        Moments(3).add(torch.zeros(pruned), None if dense is None else torch.zeros(dense))


@pytest.mark.parametrize("where", ["pruned", "dense"])
def test_an_input_that_is_not_finite_is_noticed(where):
    inputs = {"pruned": torch.ones(2, 3), "dense": torch.ones(2, 3)}
    inputs[where][1, 2] = float("inf")
    moments = Moments(3)
    moments.add(**inputs)
    assert not moments.is_finite()


def noise(tokens, seed=0):
    inputs = random(seed, tokens, 6) @ random(100, 6, 6)
    folds = Moments(6, torch.float64), Moments(6, torch.float64)
    for fold, part in zip(folds, inputs.chunk(2), strict=True):
        fold.add(part)
    return sampling_noise(folds)


@given(st.integers(2, 40), seeds)
def test_sampling_noise_is_a_share(tokens, seed):
    assert 0 <= noise(tokens, seed) < 1


def test_equal_halves_have_no_sampling_noise():
    moments = make_layer("full rank", 1, 6, seed=0).moments
    assert sampling_noise((moments, moments)) == 0


def test_sampling_noise_falls_with_the_number_of_tokens():
    few, more, many = (sum(noise(tokens, seed) for seed in range(10)) for tokens in (40, 400, 4000))
    assert few > 3 * more > 9 * many  # the variance of a mean falls tenfold each time


def test_sampling_noise_does_not_depend_on_the_scale_of_the_inputs():
    inputs, scale = random(0, 20, 6), random(1, 6).exp() * 1e3
    both = []
    for tokens in (inputs, inputs * scale):
        folds = Moments(6, torch.float64), Moments(6, torch.float64)
        for fold, part in zip(folds, tokens.chunk(2), strict=True):
            fold.add(part)
        both.append(sampling_noise(folds))
    assert both[0] == pytest.approx(both[1])


def test_a_single_input_has_no_correlations_to_be_noisy():
    first, second = Moments(1), Moments(1)
    first.add(torch.ones(3, 1))
    second.add(torch.zeros(3, 1))
    assert sampling_noise((first, second)) == 0


@pytest.mark.parametrize(("share", "expected"), [(1.0, 2.0), (0.1, 29.0), (0.03, 99.0)])
def test_burstiness_is_the_kurtosis_of_a_typical_input(share, expected):
    """Of Gaussian inputs that fire in a share of the tokens, kurtosis 3 / share: the median of a squared Gaussian."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for tokens in (2_000, 20_000):
        folds = Moments(400, torch.float64), Moments(400, torch.float64)
        for fold in folds:
            fires = torch.rand(tokens // 2, 400, generator=generator) < share
            fold.add(torch.randn(tokens // 2, 400, generator=generator, dtype=torch.float64) * fires)
        found.append(burstiness(folds))
    assert found == pytest.approx([0.455 * expected] * 2, rel=0.3)  # whatever the number of tokens


def test_burstiness_knows_neither_units_nor_dead_inputs():
    scale = torch.tensor([0, 1e-3, 1, 1e3, 0, 2], dtype=torch.float64)
    found = []
    for columns in (scale, (scale > 0).double()):
        folds = Moments(6, torch.float64), Moments(6, torch.float64)
        for k, fold in enumerate(folds):
            fold.add(random(k, 20, 6) * columns)
        found.append(burstiness(folds))
    assert found[0] == pytest.approx(found[1])
    assert burstiness([make_layer("full rank", 1, 3, seed=0).moments] * 2) == 0  # equal halves
    nothing = Moments(3)
    nothing.add(torch.zeros(2, 3))
    assert burstiness((nothing, nothing)) == 0


@pytest.mark.parametrize("estimate", [sampling_noise, burstiness])
def test_what_halves_say_needs_two_folds(estimate):
    with pytest.raises(ProblemError, match="two folds"):
        estimate([make_layer("full rank", 1, 3, seed=0).moments])


@given(layers, corrections, seeds)
def test_moments_of_outputs_pose_the_same_problem(layer, correction, seed):
    known = Moments(layer.weight.shape[1], torch.float64, outputs=len(layer.weight))
    for part in (slice(None, 5), slice(5, None)):
        known.add(layer.pruned[part])
        if layer.dense is not layer.pruned:
            known.add_errors(layer.pruned[part], (layer.dense[part] - layer.pruned[part]) @ layer.weight.T)
    weight = random(seed, *layer.weight.shape)
    values = known.reconstruction(layer.weight, correction).values(weight)
    torch.testing.assert_close(values, layer.loss(weight, correction), rtol=1e-9, atol=1e-20)
    torch.testing.assert_close(known.energy(layer.weight), layer.moments.energy(layer.weight), rtol=1e-9, atol=0)
    for chosen in (slice(0, 1), torch.tensor([0])):
        first = known.rows(chosen).reconstruction(layer.weight[chosen], correction)
        torch.testing.assert_close(first.values(weight[chosen]), values[:1], rtol=1e-9, atol=1e-20)


@given(layers, corrections, seeds)
def test_in_a_scaled_problem_each_output_counts_by_its_factor(layer, correction, seed):
    factors, weight = random(seed, len(layer.weight)).exp(), random(seed + 1, *layer.weight.shape)
    known = Moments(layer.weight.shape[1], torch.float64, outputs=len(layer.weight))
    known.add(layer.pruned)
    if layer.dense is not layer.pruned:
        known.add_errors(layer.pruned, (layer.dense - layer.pruned) @ layer.weight.T)
    for moments in (layer.moments, known):
        plain = LayerProblem(layer.weight, moments, Unstructured(0.5), correction, (moments,))
        scaled = plain.scaled(factors)
        errors = scaled.squared_error(weight * factors[:, None])
        torch.testing.assert_close(errors, plain.squared_error(weight) * factors.square(), rtol=1e-9, atol=1e-20)
        assert_same(scaled.folds[0], scaled.moments)


def test_moments_of_outputs_take_less_room_where_they_are_few():
    layer = make_layer("full rank", 2, 8, seed=0)
    known = Moments(8, torch.float64, outputs=2)
    known.add(layer.pruned)
    known.add_errors(layer.pruned, (layer.dense - layer.pruned) @ layer.weight.T)
    assert known.cross is not None and known.change is not None
    assert (known.cross.shape, known.change.shape) == ((2, 8), (2,))


@pytest.mark.parametrize(("width", "dtype"), [(-3, torch.float32), (4, torch.float16)])
def test_moments_of_fewer_than_no_inputs_or_in_16_bits_are_refused(width, dtype):
    with pytest.raises(ProblemError, match="float32 or float64"):
        Moments(width, dtype)
