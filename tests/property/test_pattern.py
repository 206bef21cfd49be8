import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random, seeds

from convexprune.constraints import SemiStructured, Stacked, Unstructured, parse_pattern
from convexprune.errors import PatternError

sparsities = st.sampled_from((0.0, 0.1, 1 / 3, 0.5, 0.65, 0.9))
rows = st.integers(1, 12)
columns = st.integers(2, 24)
quotas = st.sampled_from(("matrix", "row"))
groups = st.sampled_from(((2, 4), (1, 4), (3, 8), (4, 8), (1, 2)))


def scores(seed, m, n, ties=False):
    """Non-negative scores; with ties, of only three values."""
    values = random(seed, m, n).abs()
    return values.round().clamp_max(2) if ties else values


def slow_largest(line, kept):
    """The places of the `kept` largest; of equal ones the first."""
    return set(sorted(range(len(line)), key=lambda j: (-line[j], j))[:kept])


def places(mask):
    return {j for j, kept in enumerate(mask.flatten().tolist()) if kept}


@given(rows, columns, sparsities, seeds, st.booleans())
def test_the_largest_of_the_matrix_are_kept_and_of_equals_the_first(m, n, sparsity, seed, ties):
    values = scores(seed, m, n, ties)
    kept = m * n - round(sparsity * m * n)
    assert places(Unstructured(sparsity).mask(values)) == slow_largest(values.flatten().tolist(), kept)


@given(rows, columns, sparsities, seeds, st.booleans())
def test_the_largest_of_every_row_are_kept_and_of_equals_the_first(m, n, sparsity, seed, ties):
    values = scores(seed, m, n, ties)
    mask = Unstructured(sparsity, "row").mask(values)
    for line, kept in zip(values, mask, strict=True):
        assert places(kept) == slow_largest(line.tolist(), n - round(sparsity * n))


@given(rows, st.integers(1, 4), groups, seeds, st.booleans())
def test_the_largest_of_every_group_are_kept_and_of_equals_the_first(m, count, group, seed, ties):
    kept, width = group
    values = scores(seed, m, count * width, ties)
    mask = SemiStructured(kept, width).mask(values)
    for line, keeps in zip(values.reshape(-1, width), mask.reshape(-1, width), strict=True):
        assert places(keeps) == slow_largest(line.tolist(), kept)


@given(st.lists(st.tuples(rows, sparsities), min_size=1, max_size=3), columns, seeds, quotas)
def test_a_stack_is_its_operators_one_by_one(operators, n, seed, quota):
    heights = tuple(height for height, _ in operators)
    patterns = tuple(Unstructured(sparsity, quota) for _, sparsity in operators)
    stack, values = Stacked(patterns, heights), scores(seed, sum(heights), n)
    parts = list(zip(patterns, values.split(heights), strict=True))
    assert torch.equal(stack.mask(values), torch.cat([own.mask(part) for own, part in parts]))
    levels = [own.threshold(part).expand_as(part) for own, part in parts]
    assert torch.equal(stack.threshold(values).expand_as(values), torch.cat(levels))
    assert stack.zeros(*values.shape) == sum(own.zeros(*part.shape) for own, part in parts)


def make(name, sparsity):
    return {
        "matrix": Unstructured(sparsity),
        "row": Unstructured(sparsity, "row"),
        "2:4": SemiStructured(2, 4),
        "3:8": SemiStructured(3, 8),
        "stack": Stacked.alike(Unstructured(sparsity), (1, 3)),
        "stack of rows": Stacked.alike(Unstructured(sparsity, "row"), (1, 3)),
        "stack of 2:4": Stacked.alike(SemiStructured(2, 4), (1, 3)),
    }[name]


NAMES = ("matrix", "row", "2:4", "3:8", "stack", "stack of rows", "stack of 2:4")


@given(st.sampled_from(NAMES), sparsities, st.integers(1, 4), seeds, st.booleans())
def test_a_mask_has_exactly_the_promised_zeros(name, sparsity, eights, seed, ties):
    pattern, n = make(name, sparsity), 8 * eights
    mask = pattern.mask(scores(seed, 4, n, ties))
    assert int((~mask).sum()) == pattern.zeros(4, n)


@pytest.mark.parametrize(
    ("pattern", "m", "n", "zeros"),
    [
        (Unstructured(0.5), 3, 5, 8),  # round(7.5)
        (Unstructured(0.3), 1, 10, 3),
        (Unstructured(0.5, "row"), 3, 5, 6),  # round(2.5) is 2, as Python rounds
        (SemiStructured(2, 4), 3, 8, 12),
        (SemiStructured(3, 8), 2, 16, 20),
        (Stacked.alike(Unstructured(0.5), (1, 2)), 3, 5, 7),  # round(2.5) + round(5.0)
        (Stacked.alike(SemiStructured(1, 4), (1, 2)), 3, 4, 9),
    ],
)
def test_the_promised_zeros_are_these(pattern, m, n, zeros):
    assert pattern.zeros(m, n) == zeros


@given(st.sampled_from(NAMES), sparsities, st.lists(st.integers(1, 3), min_size=1, max_size=4), seeds)
def test_blocks_of_columns_add_up_to_the_count_of_the_whole(name, sparsity, widths, seed):
    # Blocks end where groups end; the unstructured patterns need no such thing, and get widths that are no multiples.
    grouped = ":" in name
    widths = [8 * w if grouped else 2 * w + 1 for w in widths]
    pattern, total, zeros = make(name, sparsity), sum(widths), 0
    first = 0
    for width in widths:
        zeros += int((~pattern.mask(scores(seed + first, 4, width), first)).sum())
        first += width
    assert zeros == pattern.zeros(4, total)


@given(st.sampled_from(("matrix", "row")), rows, columns)
def test_equal_scores_keep_the_lower_index(quota, m, n):
    mask = Unstructured(0.5, quota).mask(torch.ones(m, n))
    lines = mask if quota == "row" else mask.reshape(1, -1)
    assert (lines.int().diff(dim=1) <= 0).all()


@pytest.mark.parametrize("quota", ["matrix", "row"])
def test_a_sparsity_of_zero_keeps_everything(quota):
    assert Unstructured(0.0, quota).mask(torch.zeros(3, 5)).all()


@given(st.sampled_from(NAMES), sparsities, seeds)
def test_the_threshold_separates_what_is_kept_from_what_is_not(name, sparsity, seed):
    pattern, values = make(name, sparsity), scores(seed, 4, 16)
    mask = pattern.mask(values)
    threshold = pattern.threshold(values).expand_as(values)
    assert (values[mask] >= threshold[mask]).all()
    assert (values[~mask] <= threshold[~mask]).all()


@pytest.mark.parametrize("pattern", [SemiStructured(2, 4), Stacked.alike(SemiStructured(2, 4), (1, 1))])
def test_a_width_that_is_no_multiple_of_the_group_is_refused(pattern):
    with pytest.raises(PatternError, match="no multiple of 4"):
        pattern.check(2, 10)


@pytest.mark.parametrize(("sparsity", "m", "n"), [(0.9, 1, 2), (0.01, 2, 3)])
def test_a_sparsity_that_rounds_to_all_or_nothing_is_refused(sparsity, m, n):
    with pytest.raises(PatternError, match=rf"Sparsity {sparsity} of {m * n} weights rounds to .* Accepted: "):
        Unstructured(sparsity).check(m, n)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(PatternError, match="share of zeros"):
        Unstructured(sparsity)


@pytest.mark.parametrize(("kept", "group"), [(0, 4), (4, 4), (5, 4)])
def test_a_group_that_keeps_none_or_all_is_refused(kept, group):
    with pytest.raises(PatternError, match="1 <= N < M"):
        SemiStructured(kept, group)


def test_an_unknown_quota_is_refused():
    with pytest.raises(PatternError, match="quota"):
        Unstructured(0.5, "column")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "sparsity", "expected"),
    [
        ("unstructured", 0.7, Unstructured(0.7)),
        ("unstructured", None, Unstructured(0.5)),
        ("2:4", None, SemiStructured(2, 4)),
        ("2:4", 0.5, SemiStructured(2, 4)),
        ("3:8", 0.625, SemiStructured(3, 8)),
    ],
)
def test_a_name_makes_its_pattern(name, sparsity, expected):
    assert parse_pattern(name, sparsity) == expected


def test_the_quota_of_a_name_is_passed_on():
    assert parse_pattern("unstructured", 0.5, "row") == Unstructured(0.5, "row")


def test_a_pattern_that_contradicts_the_sparsity_is_refused():
    with pytest.raises(PatternError, match=r"2:4 has sparsity 0\.5, but 0\.75"):
        parse_pattern("2:4", 0.75)


@pytest.mark.parametrize("name", ["blocks", "2-4", "2:4:8", ""])
def test_an_unknown_pattern_is_refused(name):
    with pytest.raises(PatternError, match="Unknown pattern"):
        parse_pattern(name)
