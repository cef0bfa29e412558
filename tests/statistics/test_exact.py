"""Statistics that call themselves exact are: sums in float64, and merged moments are those of the whole."""

import itertools
import pickle

import numpy as np
import pytest
from tolerances import assert_same_bits

import bnfast
from bnfast import Moments, StandardScaler, _core, moments, reference

MEANS = [0.0, 1.0, 1e5, 1e6 + 0.3]
SHAPES = {  # one for every way through the kernels
    "planar, long rows": (2, 3, 20_000),
    "planar, short rows": (40, 3, 60),
    "planar, rows as columns": (300, 3, 17),
    "interleaved": (600, 70),
    "interleaved, far": (3000, 1030),
    "interleaved, folded": (3001, 3),
    "interleaved, few rows": (5, 40),
    "columns": (300, 12, 7),
}
every_mean = pytest.mark.parametrize("mean", MEANS)
LIMIT = 1e-13  # what is promised: of the variance, relative; of the mean, in units of std, and one ulp of it


def data(shape, mean, dtype=np.float32):
    return (np.random.default_rng(shape).standard_normal(shape) + mean).astype(dtype)


def check(m, x, axis=1, limit=LIMIT):
    """That these are the moments of x, as longdouble has them."""
    wide = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.longdouble)
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("longdouble is no wider than float64 on this platform: no oracle")
    mean = wide.mean(1)
    var = ((wide - mean[:, None]) ** 2).mean(1) - (wide - mean[:, None]).mean(1) ** 2
    assert (abs(m.var() / var - 1) <= limit).all(), float(abs(m.var() / var - 1).max())
    assert (abs(m.mean - mean) <= limit * np.sqrt(var) + np.spacing(abs(m.mean))).all()


@every_mean
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moments_of_float32_are_right_to_1e_13(isa, shape, mean):
    x = data(shape, mean)
    check(moments(x), x)


@pytest.mark.parametrize("shape", [(600, 70), (3001, 3), (300, 12, 7), (40, 3, 60), (200, 3, 17), (2, 3, 2000)])
@pytest.mark.parametrize("odd", [None, np.nan, np.inf, 1e30])
def test_moments_of_float32_have_the_bits_of_the_same_numbers_as_float64(isa, shape, odd):
    x = data(shape, 3)
    if odd is not None:
        x[1, 1] = odd
    with np.errstate(all="ignore"):
        for ours, expected in zip(_core.moments(x, 1)[1:], _core.moments(x.astype(np.float64), 1)[1:], strict=True):
            assert_same_bits(ours, expected)


@every_mean
@pytest.mark.parametrize("ordered", [False, True])
def test_merged_moments_are_those_of_the_whole(mean, ordered):
    """Ordered data are hard: means of parts lie far apart, and what they are rounded by does not average out."""
    x = data((40_000, 5), mean)
    if ordered:
        x.sort(axis=0)
    parts = [moments(part) for part in np.array_split(x, 13)]
    check(Moments.merge(parts), x)
    check(sum(parts), x)
    check(sum(reversed(parts)), x)
    check(Moments.merge(pickle.loads(pickle.dumps(parts))), x)
    check(Moments.merge(Moments.from_row(part.to_row()) for part in parts), x)


@every_mean
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_calibration_is_exact(mean, dtype):
    x = data((3000, 4), mean)
    x.sort(axis=0)
    bn = bnfast.BatchNorm(4, dtype=dtype)
    with bn.calibrate():
        for part in np.array_split(x, 7):
            bn(part)
    check(bn.exact_statistics, x)
    assert_same_bits(bn.exact_statistics.m2, sum(moments(part) for part in np.array_split(x, 7)).m2)


@every_mean
def test_the_scaler_is_exact(mean):
    x = data((5000, 4), mean)
    scaler = StandardScaler().fit(x)
    check(Moments(len(x), scaler.mean_, scaler.var_ * len(x)), x)


def test_without_what_means_are_rounded_by_merging_would_lose_digits():
    """The guard of the tests above: they can fail."""
    x = np.sort(data((40_000, 1), 1e6 + 0.3), axis=0)
    parts = [moments(part) for part in np.array_split(x, 13)]
    rounded = Moments.merge(Moments(m.count, m.mean, m.m2) for m in parts)
    with pytest.raises(AssertionError):
        check(rounded, x)


# --- merging as a tree ---


def test_merge_depends_on_the_order_alone():
    parts = [moments(data((n, 3), 5)) for n in (3, 1, 7, 2, 9)]
    tree = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + parts[4]
    merged = Moments.merge(iter(parts))
    assert_same_bits(merged.mean, tree.mean)
    assert_same_bits(merged.m2, tree.m2)
    assert merged.count == tree.count == 22
    assert isinstance(merged.count, int)


def merged_by_numpy(a, b):
    """Two rows of statistics as one, operation by operation as the kernels have it."""
    (n_a, *_), (n_b, *_) = a, b
    (mean_a, m2_a, rest_a), (mean_b, m2_b, rest_b) = a[1:].reshape(3, -1), b[1:].reshape(3, -1)
    part = n_b / (n_a + n_b)
    with np.errstate(all="ignore"):
        d = (mean_b - mean_a) + (rest_b - rest_a)
        step = rest_a + d * part
        mean = np.where(np.isfinite(d), mean_a + step, mean_a * (n_a / (n_a + n_b)) + mean_b * part)
        from_step = mean - mean_a
        rest = (mean_a - (mean - from_step)) + (step - from_step)
        m2 = m2_a + (m2_b + d * d * (n_a * part))
        return np.concatenate([[n_a + n_b], mean, m2, np.where(np.isfinite(rest), rest, 0.0)])


@pytest.mark.parametrize("size", [1.0, 1e9, 1e308, np.inf])
def test_a_merge_of_two_rows_is_the_formula_on_every_instruction_set(isa, size):
    rng = np.random.default_rng(3)
    for channels in (*range(1, 18), 64, 67):
        rows = np.empty((2, 1 + 3 * channels))
        rows[:, 0] = 7, 12
        rows[:, 1 : 1 + channels] = rng.normal(size=(2, channels))
        rows[:, 1 + rng.integers(channels)] = size, -size
        rows[:, 1 + channels : 1 + 2 * channels] = rng.random((2, channels))
        rows[:, 1 + 2 * channels :] = 1e-17 * rng.normal(size=(2, channels))
        expected = merged_by_numpy(*rows)
        assert np.array_equal(_core.merge_moments_rows(rows), expected, equal_nan=True), channels


def test_merge_of_one_and_of_empty_ones():
    m, empty = moments(data((4, 2), 1)), Moments(0, [0.0, 0.0], [0.0, 0.0])
    assert Moments.merge([m]) == m
    for parts in itertools.permutations([empty, m, empty, empty]):
        assert_same_bits(Moments.merge(parts).to_row(), m.to_row())
    assert Moments.merge([empty, empty]) == empty


def test_merge_refuses_what_is_no_moments_of_the_same_channels():
    m = Moments(2, [1.0], [2.0])
    for parts, error, words in (
        ([], ValueError, "at least one Moments"),
        ([m, 3], TypeError, "expected Moments, got int"),
        ([m, Moments(2, [1.0, 2.0], [0.0, 0.0])], ValueError, "expected 1 channels, got 2"),
    ):
        with pytest.raises(error, match=words):
            Moments.merge(parts)


def test_counts_beyond_float64_stay_exact():
    assert Moments.merge([Moments(2**60 + 1, [1.0], [1.0])] * 3).count == 3 * (2**60 + 1)


# --- rows ---


def test_a_row_gives_back_the_moments():
    for m in (moments(data((9, 4), 1e6)), Moments(0, [0.0], [0.0]), Moments(2.5, [1.0], [np.nan])):
        row = m.to_row()
        assert row.shape == (1 + 3 * m.mean.size,)
        assert row.dtype == np.float64
        back = Moments.from_row(row)
        assert back == m
        assert_same_bits(back.to_row(), row)
        assert type(back.count) is type(m.count)


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ([1.0, 2.0, 3.0], ValueError, r"expected 1 \+ 3 C numbers, got 3"),
        ([[1.0, 2.0, 3.0, 4.0]], ValueError, r"\(channels,\)"),
        ([-1.0, 2.0, 3.0, 0.0], ValueError, "count"),
        ([np.nan, 2.0, 3.0, 0.0], ValueError, "count"),
        ([1.0, 2.0, -3.0, 0.0], ValueError, "m2"),
        ([1j, 2.0, 3.0, 0.0], TypeError, "real numbers"),
        (["1", "2", "3", "4"], TypeError, "real numbers"),
    ],
)
def test_rows_that_are_none_are_refused(row, error, words):
    with pytest.raises(error, match=words):
        Moments.from_row(row)


def test_the_extension_refuses_rows_it_cannot_read():
    for rows in (np.zeros(4), np.zeros((2, 4), np.float32), np.zeros((4, 4))[:, ::2], np.zeros((2, 4), object)):
        with pytest.raises(TypeError, match="rows"):
            _core.merge_moments_rows(rows)


def test_what_a_mean_was_rounded_by_is_not_compared():
    m = moments(data((9, 4), 1e6 + 0.3))
    assert m.to_row()[9:].any()
    assert Moments(m.count, m.mean, m.m2) == m


# --- weights ---


@pytest.mark.parametrize(("shape", "axis"), [((50, 3), 1), ((3, 50), 0), ((6, 3, 5, 4), 1), ((6, 5, 4, 3), -1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_weights_are_repetitions(shape, axis, dtype, monkeypatch):
    monkeypatch.setattr("bnfast.statistics.weighted.BLOCK", 40)  # several parts
    x = data(shape, 1e5, dtype)
    positions = tuple(np.delete(shape, axis))
    weights = np.random.default_rng(1).integers(0, 4, positions)
    columns = np.moveaxis(x, axis, -1).reshape(-1, 3)
    repeated = np.repeat(columns, weights.ravel(), axis=0)
    m = moments(x, axis=axis, weights=weights)
    assert m.count == len(repeated)
    assert isinstance(m.count, float)
    check(m, repeated, limit=1e-12 if dtype is np.float64 else LIMIT)
    np.testing.assert_allclose(m.var(ddof=1), repeated.astype(np.float64).var(0, ddof=1), rtol=1e-9)


@every_mean
def test_weighted_moments_are_exact(mean):
    x = data((4000, 3), mean)
    weights = np.random.default_rng(0).random(4000)
    wide, w = x.astype(np.longdouble), weights.astype(np.longdouble)[:, None]
    center = (wide * w).sum(0) / w.sum()
    var = ((wide - center) ** 2 * w).sum(0) / w.sum()
    m = moments(x, weights=weights)
    assert (abs(m.var() / var - 1) <= LIMIT).all()
    assert (abs(m.mean - center) <= LIMIT * np.sqrt(var) + np.spacing(abs(m.mean))).all()


def test_weights_mean_what_the_reference_says():
    x, mask = data((6, 3, 4), 2.0, np.float64), np.arange(4) < 3
    weights = np.random.default_rng(5).random((6, 4))
    for given in ({"weights": weights}, {"weights": weights, "mask": mask}, {"weights": [1, 2, 0.5, 0]}):
        m, (count, mean, m2) = moments(x, **given), reference.moments(x, **given)
        for one, other in ((m.count, count), (m.mean, mean), (m.m2, m2)):
            np.testing.assert_allclose(one, other, rtol=1e-14)


def test_weights_broadcast_as_a_mask_does_and_go_with_one():
    x = data((6, 3, 4), 0)
    weights, mask = np.array([1.0, 0.5, 0.0, 2.0]), np.arange(6)[:, None] > 1
    whole = np.broadcast_to(weights, (6, 4))
    assert moments(x, weights=weights) == moments(x, weights=whole)
    assert moments(x, weights=weights, mask=mask) == moments(x[2:], weights=weights)
    assert moments(x, weights=3).count == 3 * 24


def test_where_a_weight_is_zero_anything_may_stand():
    x = data((20, 3), 2)
    weights = np.random.default_rng(0).random(20) * (np.arange(20) % 3 > 0)
    dirty = x.copy()
    dirty[weights == 0] = [np.nan, np.inf, 1e38]
    assert_same_bits(moments(dirty, weights=weights).to_row(), moments(x, weights=weights).to_row())
    assert moments(dirty, weights=np.zeros(20)) == Moments(0.0, np.zeros(3), np.zeros(3))
    assert moments(x[:0], weights=np.zeros(0)).count == 0
    dirty[weights > 0] = [np.nan, 1, 2]
    m = moments(dirty, weights=weights)
    assert np.isnan(m.m2).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (np.array([1.0, -1.0]), ValueError, "at least 0, got -1"),
        (np.array([1.0, np.nan]), ValueError, "finite values of at least 0, got nan"),
        (np.array([1.0, np.inf]), ValueError, "finite"),
        (np.ones(3), ValueError, r"broadcasts to \(2,\)"),
        (np.ones((2, 3)), ValueError, "without its channel axis"),
        (np.array(["a", "b"]), TypeError, "real numbers"),
        (np.ma.masked_array([1.0, 2.0]), TypeError, "without a mask"),
    ],
)
def test_wrong_weights_are_refused(weights, error, words):
    with pytest.raises(error, match=words):
        moments(np.ones((2, 3)), weights=weights)


def test_weighted_moments_refuse_what_moments_refuse():
    with pytest.raises(TypeError, match="x: "):
        moments(np.ones((2, 3), int), weights=[1, 1])
    with pytest.raises(ValueError, match="2 dimensions"):
        moments(np.ones(3), weights=1)
    with pytest.raises(np.exceptions.AxisError):
        moments(np.ones((2, 3)), axis=2, weights=1)


def test_a_layer_uses_and_saves_weighted_moments(tmp_path):
    x, weights = data((20, 3), 2, np.float64), np.random.default_rng(0).random(20) + 0.2
    m = moments(x, weights=weights)
    bn = bnfast.BatchNorm(3, dtype=np.float64).use_statistics(m)
    bn.save(tmp_path / "layer.npz")
    for layer in (bn, pickle.loads(pickle.dumps(bn)), bnfast.BatchNorm.load(tmp_path / "layer.npz")):
        assert layer.exact_statistics == m
        assert_same_bits(layer.running_var, m.var(ddof=1))
