"""`Moments` and `moments`: exact statistics that merge, whatever the grouping."""

import copy
import itertools
import math
import pickle
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnfast
from bnfast import Moments, moments

CHANNELS = 3

# Chan's formula loses about eps * |mean| / std of m2 a merge: 2e-16 * 1e3 here, so 1e-12 has room for many merges.
MERGE_TOLERANCE = 1e-12
MEAN_OFFSETS = (0.0, -7.0, 1e3)


def data(n_rows, seed=0, offset=0.0, dtype=np.float64):
    """(n_rows, CHANNELS) with standard deviation 1 and mean `offset`."""
    return (np.random.default_rng(seed).standard_normal((n_rows, CHANNELS)) + offset).astype(dtype)


def moments_of_parts(x, cuts):
    edges = [0, *sorted(cuts), len(x)]
    return [moments(x[start:stop]) for start, stop in itertools.pairwise(edges)]


def assert_close(found, expected, tolerance=MERGE_TOLERANCE):
    """Equal counts; mean and m2 to `tolerance`, measured against data of standard deviation 1."""
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=tolerance, atol=tolerance * max(1, expected.count))


def wide_moments(x):
    """The definition, in long double."""
    x = np.asarray(x, np.longdouble)
    mean = x.mean(0)
    return Moments(len(x), mean.astype(np.float64), ((x - mean) ** 2).sum(0).astype(np.float64))


# --- construction --------------------------------------------------------------------------------------------


def test_attributes_are_float64_copies_of_what_was_given():
    mean, m2 = np.array([1, 2], np.float32), [3, 4]
    m = Moments(np.int32(5), mean, m2)
    mean[:] = 99
    assert type(m.count) is int
    assert m.count == 5
    for found, expected in ((m.mean, [1.0, 2.0]), (m.m2, [3.0, 4.0])):
        assert found.dtype == np.float64
        assert found.tolist() == expected


def test_nothing_of_it_can_be_changed():
    m = Moments(2, [1.0, 2.0], [3.0, 4.0])
    for name in ("count", "mean", "m2", "new"):
        with pytest.raises(AttributeError):
            setattr(m, name, 1)
    for name in ("count", "mean", "m2"):
        with pytest.raises(AttributeError):
            delattr(m, name)
    for array in (m.mean, m.m2):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7.0
    assert m == Moments(2, [1.0, 2.0], [3.0, 4.0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1, [0.0], [0.0]), ValueError, ["count", "at least 0", "-1"]),
        ((-0.5, [0.0], [0.0]), ValueError, ["count", "at least 0", "-0.5"]),
        ((np.inf, [0.0], [0.0]), ValueError, ["count", "finite", "inf"]),
        ((1j, [0.0], [0.0]), TypeError, ["count", "int", "complex"]),
        ((True, [0.0], [0.0]), TypeError, ["count", "int", "True"]),
        (("2", [0.0], [0.0]), TypeError, ["count", "int", "str"]),
        ((None, [0.0], [0.0]), TypeError, ["count", "int", "NoneType"]),
        ((2, [0.0, 1.0], [0.0]), ValueError, ["m2", "(2,)", "(1,)"]),
        ((2, 0.0, 0.0), ValueError, ["mean", "(channels,)", "()"]),
        ((2, [[0.0]], [[0.0]]), ValueError, ["mean", "(channels,)", "(1, 1)"]),
        ((2, [0.0], [[0.0]]), ValueError, ["m2", "(channels,)", "(1, 1)"]),
        ((2, [0.0], [-1.0]), ValueError, ["m2", "at least 0", "-1"]),
        ((2, [0.0, 0.0], [np.nan, -1.0]), ValueError, ["m2", "at least 0", "-1"]),
        ((2, [1j], [0.0]), TypeError, ["mean", "real", "complex128"]),
        ((2, ["a"], [0.0]), TypeError, ["mean", "real", "<U1"]),
        ((2, [0.0], [True]), TypeError, ["m2", "real", "bool"]),
        ((2, [None], [0.0]), TypeError, ["mean", "real", "object"]),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, words):
    with pytest.raises(error) as caught:
        Moments(*arguments)
    for word in words:
        assert word in str(caught.value)


def test_nan_in_m2_is_let_through():
    assert math.isnan(Moments(2, [np.nan], [np.nan]).var()[0])


# --- variance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_var_and_std_divide_by_count_less_ddof(ddof):
    x = data(10)
    m = moments(x)
    np.testing.assert_allclose(m.var(ddof), x.var(0, ddof=ddof), rtol=1e-13)
    np.testing.assert_allclose(m.std(ddof), x.std(0, ddof=ddof), rtol=1e-13)
    np.testing.assert_array_equal(m.std(ddof), np.sqrt(m.var(ddof)))


def test_the_population_variance_is_the_default():
    m = Moments(4, [0.0], [8.0])
    assert m.var().tolist() == [2.0]
    assert m.std().tolist() == [math.sqrt(2.0)]


@pytest.mark.parametrize(("count", "ddof"), [(0, 0), (0, 1), (1, 1), (1, 2)])
def test_variance_of_too_few_values_is_nan_without_a_warning(count, ddof):
    m = Moments(count, [0.0, 0.0], [0.0, 0.0])
    assert np.isnan(m.var(ddof)).all()
    assert np.isnan(m.std(ddof)).all()


def test_variance_is_the_callers_to_change():
    m = Moments(2, [0.0], [2.0])
    m.var()[0] = 99
    m.var(ddof=2)[0] = 99
    assert m == Moments(2, [0.0], [2.0])


# --- merging -------------------------------------------------------------------------------------------------


def test_merge_of_two_by_hand():
    # 1, 3 and 5, 7, 9: means 2 and 7, m2 2 and 8; all five: mean 5, m2 16 + 4 + 0 + 4 + 16
    whole = Moments(2, [2.0], [2.0]) + Moments(3, [7.0], [8.0])
    assert whole == Moments(5, [5.0], [40.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_rows=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from(MEAN_OFFSETS),
    order=st.randoms(use_true_random=False),
)
def test_parts_in_any_order_merge_to_the_whole(n_rows, cuts, seed, offset, order):
    x = data(n_rows, seed, offset)
    parts = moments_of_parts(x, [min(cut, n_rows) for cut in cuts])
    order.shuffle(parts)
    merged = sum(parts)
    assert_close(merged, wide_moments(x))
    assert_close(merged, moments(x))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(0, 100)] * 3),
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from(MEAN_OFFSETS),
)
def test_merging_is_associative_and_commutative_to_rounding(sizes, seed, offset):
    a, b, c = moments_of_parts(data(sum(sizes), seed, offset), [sizes[0], sizes[0] + sizes[1]])
    assert_close((a + b) + c, a + (b + c))
    assert_close(a + b, b + a)


def test_sum_of_a_list_and_of_a_generator_merge():
    parts = moments_of_parts(data(20), [3, 4, 11])
    assert sum(parts) == sum(part for part in parts) == reduce(add, parts)
    assert sum(parts[:1]) == parts[0]


def test_merging_leaves_both_as_they_were():
    a, b = Moments(2, [2.0], [2.0]), Moments(3, [7.0], [8.0])
    assert (a + b).count == 5
    assert (a, b) == (Moments(2, [2.0], [2.0]), Moments(3, [7.0], [8.0]))


def test_count_zero_changes_nothing():
    nothing, some = Moments(0, np.zeros(CHANNELS), np.zeros(CHANNELS)), moments(data(5))
    assert nothing + some == some + nothing == some
    assert nothing + nothing == nothing
    assert sum([nothing, some, nothing]) == some


@pytest.mark.parametrize("other", [1, 0.0, None, "a", (2, [0.0], [0.0])])
def test_only_moments_can_be_added(other):
    with pytest.raises(TypeError):
        Moments(2, [0.0], [0.0]) + other
    with pytest.raises(TypeError):
        other + Moments(2, [0.0], [0.0])


def test_channels_must_agree():
    for other in (Moments(2, [0.0] * 2, [0.0] * 2), Moments(0, [0.0] * 2, [0.0] * 2)):
        with pytest.raises(ValueError, match=r"3 channels, got 2"):
            Moments(2, [0.0] * 3, [0.0] * 3) + other


def test_counts_do_not_overflow():
    half = Moments(2**70, [1.0], [2.0**70])
    assert half + half == Moments(2**71, [1.0], [2.0**71])


def test_nan_and_inf_stay_in_their_channel_without_a_warning():
    plain = Moments(3, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    odd = Moments(2, [np.nan, np.inf, 5.0], [np.nan, np.nan, 1.0])
    expected = Moments(3, [3.0], [1.0]) + Moments(2, [5.0], [1.0])
    for merged in (plain + odd, odd + plain, odd + odd + plain):
        assert np.isnan(merged.m2[:2]).all()
        assert np.isfinite(merged.m2[2])
    assert (plain + odd).mean[2] == expected.mean[0]
    assert (plain + odd).m2[2] == expected.m2[0]


def test_variance_of_the_whole_is_not_the_average_of_the_variances():
    """Law of total variance: Var = E[Var within] + Var[means]; an average of batch variances lacks the second term."""
    a, b = data(50, seed=1, offset=0.0), data(50, seed=2, offset=10.0)
    parts = [moments(a), moments(b)]
    within = (parts[0].var() + parts[1].var()) / 2
    between = (parts[0].mean - parts[1].mean) ** 2 / 4
    whole = sum(parts).var()
    np.testing.assert_allclose(whole, within + between, rtol=1e-13)
    np.testing.assert_allclose(whole, np.concatenate([a, b]).var(0), rtol=1e-13)
    assert (whole > 10 * within).all()


# --- comparison, copies, printing ----------------------------------------------------------------------------


def test_equality_is_of_all_three():
    m = Moments(2, [1.0, 2.0], [3.0, 4.0])
    assert m == Moments(2, [1.0, 2.0], [3.0, 4.0])
    for other in (
        Moments(3, [1.0, 2.0], [3.0, 4.0]),
        Moments(2, [1.0, 2.5], [3.0, 4.0]),
        Moments(2, [1.0, 2.0], [3.0, 4.5]),
        Moments(2, [1.0], [3.0]),
        (2, [1.0, 2.0], [3.0, 4.0]),
        None,
    ):
        assert m != other


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Moments(2, [1.0], [3.0]), Moments(2, [1.0], [3.0])),
        (Moments(2, [0.0], [0.0]), Moments(2, [-0.0], [-0.0])),
        (Moments(2, [np.nan], [np.nan]), Moments(2, [np.nan], [np.nan])),
        # the sign of a NaN: Inf - Inf gives the negative one on x86, np.nan is the positive one
        (Moments(2, [np.nan], [np.nan]), Moments(2, [-np.nan], [-np.nan])),
        (Moments(2, [np.inf], [np.inf]), Moments(2, [np.inf], [np.inf])),
    ],
    ids=["plain", "zero_of_either_sign", "nan", "nan_of_either_sign", "inf"],
)
def test_equal_moments_have_equal_hashes(a, b):
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b}) == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "m", [Moments(2, [1.0, np.nan], [3.0, np.inf]), Moments(0, [], []), Moments(2**70, [1e-310], [0.1])]
)
def test_pickle_gives_the_same_bits(m, protocol):
    again = pickle.loads(pickle.dumps(m, protocol))
    assert again == m
    assert again.mean.tobytes() == m.mean.tobytes()
    assert again.m2.tobytes() == m.m2.tobytes()
    assert not again.mean.flags.writeable


def test_copies_are_equal():
    m = Moments(2, [1.0, 2.0], [3.0, 4.0])
    assert copy.copy(m) == copy.deepcopy(m) == m


def test_repr_evaluates_to_an_equal_object():
    m = Moments(2, [1.0, np.nan], [0.375, np.inf])
    assert eval(repr(m), {"Moments": Moments, "array": np.array, "nan": np.nan, "inf": np.inf}) == m


# --- moments(x) ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_moments_of_data_follow_the_definition(dtype, axis):
    x = np.random.default_rng(0).normal(5.0, 2.0, (4, 5, 6)).astype(dtype)
    m = moments(x, axis=axis)
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    expected = wide_moments(rows)
    assert type(m) is Moments
    assert m.count == expected.count
    # float32 data: DESIGN.md A8, mean to 1e-7 std and variance to 2e-7; float64: rounding of some additions
    tolerance = 2e-7 if dtype == np.float32 else 1e-14
    np.testing.assert_allclose(m.mean, expected.mean, rtol=tolerance)
    np.testing.assert_allclose(m.m2, expected.m2, rtol=tolerance)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0)])
def test_moments_of_no_data_have_count_zero(shape):
    assert moments(np.empty(shape)) == Moments(0, np.zeros(3), np.zeros(3))


def test_one_value_a_channel_has_no_deviation():
    m = moments(np.array([[3.0, -1e300]]))
    assert m == Moments(1, [3.0, -1e300], [0.0, 0.0])


def test_axis_is_a_keyword():
    with pytest.raises(TypeError):
        moments(np.zeros((2, 3)), 1)
    assert bnfast.moments is moments
