"""StandardScaler: its own promises, and scikit-learn's results where scikit-learn is installed."""

import copy
import datetime
import functools
import multiprocessing
import pickle
import sys
import threading
import tracemalloc
import warnings

import numpy as np
import pytest
from places import ROOT
from scripts import run_script

import bnfast
from bnfast import _core
from bnfast.scaling import scaler as module
from bnfast.scaling.scaler import StandardScaler

FITTED = ("mean_", "var_", "scale_", "n_samples_seen_")
# Against scikit-learn, float64 sums in another order; its float32 results are rounded three times to our two.
FLOAT64, FLOAT32, FLOAT16 = 1e-13, 3e-7, 1e-3


@functools.cache
def table(n_rows=200, n_features=7, seed=0):
    """Features of means 0, 1, 2, ... and scales from 1 to 1e3, float64."""
    rng = np.random.default_rng(seed)
    x = rng.normal(np.arange(n_features), np.logspace(0, 3, n_features), (n_rows, n_features))
    x.flags.writeable = False
    return x


def with_nan(x, share=0.1, columns=slice(None, None, 2)):
    x = x.copy()
    x[:, columns][np.random.default_rng(1).random(x[:, columns].shape) < share] = np.nan
    return x


def state(scaler):
    """All of it, to be compared with ==."""
    return {name: (type(value), np.asarray(value).tobytes()) for name, value in vars(scaler).items()}


def assert_same_fit(found, expected, tolerance=FLOAT64):
    for name in FITTED:
        a, b = getattr(found, name), getattr(expected, name)
        if b is None:
            assert a is None, name
            continue
        assert np.shape(a) == np.shape(b), name
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def definition(x, weights=None):
    """Mean and variance in long double, NaN left out."""
    x = np.asarray(x, np.longdouble)
    w = np.where(np.isnan(x), 0, 1 if weights is None else np.asarray(weights, np.longdouble)[:, None])
    x = np.where(np.isnan(x), 0, x)
    mean = (w * x).sum(0) / w.sum(0)
    return mean, (w * (x - mean) ** 2).sum(0) / w.sum(0)


def assert_fitted_to(scaler, x, weights=None, tolerance=FLOAT64):
    mean, var = definition(x, weights)
    np.testing.assert_allclose(scaler.mean_, mean.astype(float), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(scaler.var_, var.astype(float), rtol=tolerance)


# --- by itself: fit -------------------------------------------------------------------------------------------


def test_by_hand():
    scaler = StandardScaler().fit([[1, 10], [3, 10], [8, 10]])
    assert scaler.mean_.tolist() == [4.0, 10.0]
    np.testing.assert_allclose(scaler.var_, [26 / 3, 0.0])
    np.testing.assert_allclose(scaler.scale_, [np.sqrt(26 / 3), 1.0])
    assert scaler.n_samples_seen_ == 3
    assert type(scaler.n_samples_seen_) is np.int64
    assert scaler.n_features_in_ == 2
    assert not hasattr(scaler, "feature_names_in_")
    np.testing.assert_allclose(scaler.transform([[4, 11]]), [[0.0, 1.0]])


@pytest.mark.parametrize("n_rows", [1, 2, 3, 31, 1000])
@pytest.mark.parametrize("n_features", [1, 5, 16, 33])
@pytest.mark.parametrize("order", ["C", "F"])
def test_statistics_follow_the_definition(n_rows, n_features, order):
    x = np.asarray(table(n_rows, n_features), order=order)
    assert_fitted_to(StandardScaler().fit(x), x)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.longdouble, ">f4", ">f8"])
def test_other_floats(dtype):
    x = (table() / 100).astype(dtype)
    scaler = StandardScaler().fit(x)
    assert_fitted_to(scaler, x, tolerance=3e-7 if dtype is np.float32 else FLOAT64)
    y = scaler.transform(x)
    kept = np.dtype(dtype).itemsize <= 8
    assert y.dtype == (np.dtype(dtype).newbyteorder("=") if kept else np.float64)
    expected = (x.astype(np.float64) - scaler.mean_) / scaler.scale_
    np.testing.assert_allclose(y, expected, rtol=FLOAT16, atol=FLOAT16)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.bool_, object])
def test_what_is_no_float_becomes_float64(dtype):
    x = np.abs(table()).astype(np.int64) % 100
    x = (x % 2 == 0) if dtype is np.bool_ else x.astype(dtype)
    scaler = StandardScaler().fit(x)
    assert_fitted_to(scaler, x.astype(np.float64))
    y = scaler.transform(x)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, (x.astype(float) - scaler.mean_) / scaler.scale_, rtol=FLOAT64, atol=FLOAT64)


def test_data_that_are_converted_in_chunks(monkeypatch):
    x = np.abs(table(1000)).astype(np.int32)
    whole = StandardScaler().fit(x)
    monkeypatch.setattr("bnfast.scaling.data.CHUNK", 7 * 33)
    chunked = StandardScaler().fit(x)
    assert_same_fit(chunked, whole)
    np.testing.assert_array_equal(whole.transform(x), whole.transform(x.astype(np.float64)))


def test_float32_far_from_zero():
    """The mean is not rounded to float32 before it is subtracted: the error is that of the result's own rounding."""
    x = np.random.default_rng(0).normal(1e9, 1e3, (100_000, 3)).astype(np.float32)
    scaler = StandardScaler().fit(x)
    mean, var = definition(x)
    np.testing.assert_allclose(scaler.mean_, mean.astype(float), rtol=1e-15)
    np.testing.assert_allclose(scaler.var_, var.astype(float), rtol=3e-7)
    y = scaler.transform(x)
    assert y.dtype == np.float32
    exact = (x.astype(np.longdouble) - mean) / np.sqrt(var)
    assert (np.abs(y - exact) <= 3e-7 * (1 + np.abs(exact))).all()


def test_float32_far_from_zero_and_back():
    """Within the rounding of the result, half a unit in the last place, and a little for that of z."""
    x = np.random.default_rng(0).normal(1e6, 10, (10_000, 3)).astype(np.float32)
    scaler = StandardScaler().fit(x)
    back = scaler.inverse_transform(scaler.transform(x))
    assert back.dtype == np.float32
    assert np.abs(back.astype(float) - x).max() <= np.spacing(np.float32(1e6))
    z = np.linspace(-3, 3, 999, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    exact = z.astype(np.longdouble) * scaler.scale_ + scaler.mean_
    assert np.abs(scaler.inverse_transform(z) - exact).max() <= 0.5001 * np.spacing(np.float32(1e6))


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e30, 1e37])
def test_float32_at_the_ends_of_its_range(scale):
    x = (np.random.default_rng(0).normal(0.5, 1, (500, 3)) * scale).astype(np.float32)
    scaler = StandardScaler().fit(x)
    y = scaler.transform(x)
    exact = (x.astype(np.longdouble) - scaler.mean_) / scaler.scale_
    np.testing.assert_allclose(y.astype(float), exact.astype(float), rtol=3e-7, atol=3e-7)
    back = scaler.inverse_transform(y)
    step = np.spacing(np.float32(scale))
    np.testing.assert_allclose(back.astype(float), x.astype(float), rtol=1e-6, atol=2 * float(step))
    out = x.copy()
    assert scaler.transform(out, out=out) is out
    np.testing.assert_array_equal(out, y)


def test_constant_features():
    x = table(100, 3).copy()
    x[:, 0], x[:, 1] = 0.1, 1e8
    for data in (x, x.astype(np.float32)):
        scaler = StandardScaler().fit(data)
        assert scaler.var_[:2].tolist() == [0.0, 0.0]
        assert scaler.scale_[:2].tolist() == [1.0, 1.0]
        assert (scaler.transform(data)[:, :2] == 0).all()


def test_a_variance_within_rounding_is_that_of_a_constant():
    x = np.full((1000, 1), 1e9)
    x[0] += 1e-6
    scaler = StandardScaler().fit(x)
    assert scaler.var_[0] > 0
    assert scaler.scale_[0] == 1.0


def unix_times(n_rows):
    return np.random.default_rng(0).normal(1.7e9, 0.1, (n_rows, 1))


@pytest.mark.parametrize("n_rows", [100, 10_000, 1_000_000])
def test_more_rows_do_not_make_a_feature_constant(n_rows):
    """Times of 2023 in seconds, a tenth of a second apart: scikit-learn's rule takes a million of them for constant."""
    scaler = StandardScaler().fit(unix_times(n_rows))
    np.testing.assert_allclose(scaler.scale_, 0.1, rtol=0.2)
    assert scaler.scale_ == np.sqrt(scaler.var_)


@pytest.mark.parametrize("unit", [2.3e15, 1.0, 1e-300, 1e300, 2.0**-1000])
def test_the_unit_of_the_weights_changes_nothing(unit):
    found = StandardScaler().fit([[0.0], [1.0]], sample_weight=unit)
    assert (found.mean_[0], found.var_[0], found.scale_[0]) == (0.5, 0.25, 0.5)
    x, weights = unix_times(500), np.random.default_rng(2).random(500)
    found = StandardScaler().fit(x, sample_weight=weights * unit)
    expected = StandardScaler().fit(x, sample_weight=weights)
    np.testing.assert_allclose(found.scale_, expected.scale_, rtol=1e-12)
    assert 0.05 < found.scale_[0] < 0.2


def test_weights_times_a_power_of_two_change_no_bit():
    x, weights = with_nan(table()), np.random.default_rng(2).random(200)
    first, second = (StandardScaler().fit(x, sample_weight=weights * unit) for unit in (1.0, 2.0**-30))
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(("with_mean", "with_std"), [(True, True), (True, False), (False, True), (False, False)])
def test_parameters(with_mean, with_std):
    x = table()
    scaler = StandardScaler(with_mean=with_mean, with_std=with_std).fit(x)
    assert (scaler.mean_ is None) == (not with_mean and not with_std)
    assert (scaler.var_ is None) == (scaler.scale_ is None) == (not with_std)
    assert scaler.n_samples_seen_ == len(x)
    expected = (x - (x.mean(0) if with_mean else 0)) / (x.std(0) if with_std else 1)
    y = scaler.transform(x)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert not np.shares_memory(x, y)
    np.testing.assert_allclose(scaler.inverse_transform(y), x, rtol=1e-12, atol=1e-12)


def test_zeros_keep_their_sign_where_nothing_is_subtracted():
    z = np.array([[-0.0], [0.0]])
    for parameters in ({"with_mean": False}, {"with_mean": False, "with_std": False}):
        y = StandardScaler(**parameters).fit([[1.0], [5.0]]).transform(z)
        assert np.signbit(y).ravel().tolist() == [True, False]


# --- NaN and infinity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("columns", [slice(None, None, 2), slice(None), slice(3, 4)], ids=["some", "all", "one"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_nan_are_missing_values(dtype, columns, order, monkeypatch):
    monkeypatch.setattr("bnfast.scaling.data.CHUNK", 7 * 17)
    x = np.asarray(with_nan(table() / 100, columns=columns), dtype, order=order)
    scaler = StandardScaler().fit(x)
    assert_fitted_to(scaler, x, tolerance=3e-7 if dtype is np.float32 else FLOAT64)
    assert scaler.n_samples_seen_.dtype == np.int64
    assert scaler.n_samples_seen_.tolist() == (~np.isnan(x)).sum(0).tolist()
    y = scaler.transform(x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_allclose(
        y, (x.astype(float) - scaler.mean_) / scaler.scale_, rtol=FLOAT16, atol=FLOAT16 if dtype is np.float16 else 1e-6
    )


def test_as_many_nan_in_each_feature_make_the_count_an_int_again():
    x = table().copy()
    x[range(7), range(7)] = np.nan
    assert StandardScaler().fit(x).n_samples_seen_ == 199
    assert np.ndim(StandardScaler().fit(x).n_samples_seen_) == 0


def test_a_feature_that_is_missing_altogether():
    x = table().copy()
    x[:, 2] = np.nan
    scaler = StandardScaler().fit(x)
    assert scaler.n_samples_seen_[2] == 0
    assert np.isnan([scaler.mean_[2], scaler.var_[2], scaler.scale_[2]]).all()
    assert_same_fit(scaler.partial_fit(table(50, seed=1)), StandardScaler().fit(np.concatenate([x, table(50, seed=1)])))
    before = StandardScaler().fit(table(50, seed=1))
    assert_same_fit(before.partial_fit(x), scaler)


def into_another_array(transform):
    """`transform` with `out=`, of which nothing may be written when it raises."""

    def call(data):
        out = np.full(data.shape, 7.0, data.dtype if data.dtype.kind == "f" else np.float64)
        try:
            transform(data, out=out)
        finally:
            assert (out == 7.0).all()

    return call


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, object])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("place", [(0, 0), (-1, -1), (77, 3)])
def test_infinities_are_refused(value, dtype, order, missing, place):
    x = np.asarray(table() / 100, order=order)
    scaler = StandardScaler().fit(x)
    before = state(scaler)
    bad = (with_nan(x) if missing else x).astype(dtype)
    bad[place] = value
    for call in (
        scaler.fit,
        scaler.partial_fit,
        scaler.transform,
        scaler.fit_transform,
        scaler.inverse_transform,
        into_another_array(scaler.transform),
        into_another_array(scaler.inverse_transform),
        lambda data: scaler.fit(data, sample_weight=np.arange(200.0)),
        lambda data: scaler.fit(data, batch_size=13),
    ):
        with pytest.raises(ValueError, match=r"Input X contains infinity or a value too large for dtype\('float"):
            call(bad)
        assert state(scaler) == before


def test_a_missing_feature_does_not_hide_that_another_is_out_of_range():
    x = np.full((5001, 2), 2e38, np.float32)
    x[:, 0], x[0, 1] = np.nan, -2e38
    alone = StandardScaler().fit_transform(x[:, 1:])
    np.testing.assert_array_equal(StandardScaler().fit_transform(x)[:, 1:], alone)
    assert np.isfinite(alone).all()


def test_batch_size_of_any_integer_type(rng):
    x = rng.normal(size=(400, 2))
    np.testing.assert_array_equal(
        StandardScaler().fit(x, batch_size=np.int8(100)).mean_, StandardScaler().fit(x, batch_size=100).mean_
    )


def test_the_sum_of_one_is_another_object(rng):
    x = rng.normal(size=(40, 2))
    scaler = StandardScaler().fit(x)
    assert sum([scaler]) is not scaler


@pytest.mark.parametrize("shape", [(3000, 100), (100_000, 3), (20, 20_000)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_infinity_is_found_wherever_it_is(shape, order, dtype, isa):
    """Two threads, every kind of task: blocks of channels, segments, rows that are left over."""
    x = np.ones(shape, dtype, order=order)
    coefficients = np.zeros(shape[1]), np.ones(shape[1]), None, None
    rng = np.random.default_rng(0)
    places = [(0, 0), (shape[0] - 1, shape[1] - 1), *zip(*(rng.integers(n, size=12) for n in shape), strict=True)]
    with bnfast.num_threads(2):
        assert not _core.affine(x, *coefficients, True)[1]
        for place in places:
            for value, found in ((np.inf, True), (-np.inf, True), (np.nan, False), (np.finfo(dtype).max, False)):
                x[place] = value
                assert _core.affine(x, *coefficients, True)[1] == found
                assert not _core.affine(x, *coefficients, False)[1]
            x[place] = 1


def test_in_place_an_infinity_is_found_before_anything_is_written():
    x = table().copy()
    x[150, 3] = np.inf
    before = x.copy()
    scaler = StandardScaler(copy=False).fit(table())
    for call in (
        scaler.transform,
        scaler.inverse_transform,
        functools.partial(scaler.transform, out=x),
        functools.partial(scaler.transform, copy=True, out=x),
    ):
        with pytest.raises(ValueError, match="infinity"):
            call(x)
        np.testing.assert_array_equal(x, before)


def test_a_variance_that_float64_cannot_hold_is_refused_and_nothing_changes():
    scaler = StandardScaler().fit([[1.0, 1.0], [3.0, 2.0]])
    with pytest.raises(ValueError, match="too large in feature 0"):
        scaler.partial_fit([[1e200, 1.0], [-1e200, 2.0]])
    assert scaler.var_.tolist() == [1.0, 0.25]
    assert scaler.n_samples_seen_ == 2
    with pytest.raises(ValueError, match="too large in feature 0"):
        StandardScaler().fit([[1e200, 1.0], [-1e200, 2.0]], sample_weight=[1, 2])
    assert StandardScaler(with_std=False).fit([[1e200], [3e200]]).mean_[0] == 2e200


# --- weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_weights(missing, dtype, monkeypatch):
    monkeypatch.setattr("bnfast.scaling.data.CHUNK", 7 * 17)
    x = table().astype(dtype)
    x = with_nan(x) if missing and dtype is not np.int64 else x
    weights = np.random.default_rng(2).random(len(x))
    weights[::5] = 0
    scaler = StandardScaler().fit(x, sample_weight=weights)
    assert_fitted_to(scaler, x, weights, tolerance=1e-12)
    expected = (weights[:, None] * ~np.isnan(x.astype(float))).sum(0)
    np.testing.assert_allclose(scaler.n_samples_seen_ * np.ones(7), expected, rtol=1e-14)
    assert np.asarray(scaler.n_samples_seen_).dtype == np.float64


def test_weighted_constants():
    x, weights = case_constant(table()), np.random.default_rng(2).random(200)
    scaler = StandardScaler().fit(x, sample_weight=weights)
    np.testing.assert_allclose(scaler.mean_[1:4], [0.0, 0.1, -1e9], rtol=1e-15)
    assert scaler.scale_[1:4].tolist() == [1.0, 1.0, 1.0]
    assert (scaler.var_ >= 0).all()


def test_a_weighted_constant_has_variance_zero_however_far_from_zero():
    x = np.full((1000, 3), [0.1, -1e15 / 3, 1e-300])
    scaler = StandardScaler().fit(x, sample_weight=np.random.default_rng(0).random(1000))
    assert scaler.mean_.tolist() == x[0].tolist()
    assert scaler.var_.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_weighted_sums_run_down_the_rows(order):
    """One after another, as no product of matrices promises it: a BLAS chooses its order by the CPU."""
    x, weights = table(1000, 5).copy(), np.random.default_rng(2).random(1000)
    x[0] = 0.0  # from which differences are taken
    share = weights * 2.0 ** -np.frexp(weights.max())[1]
    first, second = (functools.reduce(np.add, x**power * share[:, None]) for power in (1, 2))
    given = np.repeat(x, 2, axis=1)[:, ::2] if order == "strided" else np.array(x, order=order)
    found = StandardScaler().fit(given, sample_weight=weights)
    np.testing.assert_array_equal(found.mean_, first / np.add.reduce(share))
    np.testing.assert_allclose(found.var_, second / share.sum() - found.mean_**2, rtol=1e-14)
    with_gaps = [StandardScaler().fit(with_nan(array), sample_weight=weights).var_ for array in (given, x)]
    np.testing.assert_array_equal(*with_gaps)


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e15 / 3])
@pytest.mark.parametrize("outlier", [0.0, 1e6])
def test_weighted_statistics_of_many_chunks(offset, outlier):
    """Later chunks are summed from the mean so far, in one pass; where that is far off, in two."""
    x = np.random.default_rng(0).normal(0, 1, (30_000, 3))
    x[0] += outlier
    x[20_000:] += outlier
    x += offset
    weights = np.random.default_rng(1).random(len(x))
    weights[5:7] = 0
    scaler = StandardScaler().fit(x, sample_weight=weights)
    mean, var = definition(x - offset, weights)  # these differences are exact
    np.testing.assert_allclose(scaler.mean_, (mean + offset).astype(float), rtol=1e-15, atol=1e-14)
    np.testing.assert_allclose(scaler.var_, var.astype(float), rtol=2e-14)
    fortran = StandardScaler().fit(np.asfortranarray(x), sample_weight=weights)
    np.testing.assert_array_equal(fortran.var_, scaler.var_)


def test_whole_weights_are_repetitions():
    weights = np.arange(200) % 4
    x = with_nan(table())
    assert_same_fit(StandardScaler().fit(x, sample_weight=weights), StandardScaler().fit(np.repeat(x, weights, axis=0)))


def test_a_scalar_weight_and_a_list():
    x = table(3, 2)
    assert StandardScaler().fit(x, sample_weight=2.0).n_samples_seen_ == 6.0
    assert_same_fit(StandardScaler().fit(x, None, [1, 1, 1]), StandardScaler().fit(x))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.zeros(200), "at least one non-zero"),
        (np.ones(199), r"sample_weight.shape == \(199,\), expected \(200,\)!"),
        (np.ones((200, 1)), "must be 1D array or scalar, got 2D"),
        (np.full(200, np.nan), "Input sample_weight contains NaN"),
        (np.full(200, np.inf), "Input sample_weight contains infinity"),
        (np.ones(200, complex), "Complex data not supported"),
        (np.r_[-1.0, np.ones(199)], "sample_weight: expected values of at least 0, got -1.0"),
        (np.r_[-1.0, 1.0, np.zeros(198)], "sample_weight: expected values of at least 0, got -1.0"),
        (np.full(200, 1e308), "sample_weight: expected a sum that float64 holds"),
        (-1.0, "sample_weight: expected values of at least 0"),
    ],
)
def test_weights_that_do_not_fit(weights, words):
    scaler = StandardScaler().fit(table())
    before = state(scaler)
    with pytest.raises(ValueError, match=words):
        scaler.fit(table(), sample_weight=weights)
    assert state(scaler) == before


# --- parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"with_mean": False}, {"with_std": False}])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_make_the_whole(parameters, missing, weighted):
    x = with_nan(table()) if missing else table()
    weights = np.random.default_rng(3).random(len(x)) if weighted else None
    whole = StandardScaler(**parameters).fit(x, sample_weight=weights)
    cuts = [slice(0, 1), slice(1, 40), slice(40, 200)]
    parts = [(x[rows], None, None if weights is None else weights[rows]) for rows in cuts]
    by_parts = StandardScaler(**parameters)
    for part in parts:
        assert by_parts.partial_fit(*part) is by_parts
    scalers = [StandardScaler(**parameters).fit(*part) for part in parts]
    before = [state(scaler) for scaler in scalers]
    for found in (
        by_parts,
        StandardScaler(**parameters).fit(x, sample_weight=weights, batch_size=37),
        scalers[0].merge(scalers[1]).merge(scalers[2]),
        scalers[0] + (scalers[1] + scalers[2]),
        sum(scalers),
    ):
        assert_same_fit(found, whole, 1e-12)
        assert type(found) is StandardScaler
    assert [state(scaler) for scaler in scalers] == before


def test_the_variance_of_parts_with_different_means():
    a, b = np.zeros((10, 1)), np.full((30, 1), 8.0)
    merged = StandardScaler().fit(a) + StandardScaler().fit(b)
    assert merged.mean_[0] == 6.0
    assert merged.var_[0] == 12.0
    assert merged.scale_[0] == np.sqrt(12)


def test_parts_with_and_without_weights():
    x = table()
    scaler = StandardScaler().fit(x[:100]).partial_fit(x[100:], sample_weight=np.full(100, 3.0))
    assert scaler.n_samples_seen_ == 400.0
    assert_fitted_to(scaler, x, np.repeat([1.0, 3.0], 100))


def test_merge_over_processes():
    tables = [table(100, seed=seed) for seed in range(4)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.map(StandardScaler().fit, tables)
    assert_same_fit(sum(parts), StandardScaler().fit(np.concatenate(tables)))


def test_merge_keeps_parameters_and_names():
    a = StandardScaler(copy=False).fit(table(10, 2))
    b = StandardScaler().fit(table(10, 2, seed=1))
    b.feature_names_in_ = np.array(["p", "q"], object)
    for merged in (a + b, b + a):
        assert merged.feature_names_in_.tolist() == ["p", "q"]
    assert (a + b).copy is False
    assert (b + a).copy is True


def test_what_does_not_merge():
    scaler = StandardScaler().fit(table())
    named, other_names = copy.copy(scaler), copy.copy(scaler)
    named.feature_names_in_ = np.array(list("abcdefg"), object)
    other_names.feature_names_in_ = np.array(list("abcdefh"), object)
    with pytest.raises(ValueError, match="other: expected features"):
        named.merge(other_names)
    with pytest.raises(ValueError, match="other: expected n_features_in_=7, got 3"):
        scaler.merge(StandardScaler().fit(table(10, 3)))
    with pytest.raises(ValueError, match="other: expected with_std=True, got False"):
        scaler.merge(StandardScaler(with_std=False).fit(table()))
    for a, b in ((scaler, StandardScaler()), (StandardScaler(), scaler)):
        with pytest.raises(ValueError, match="not fitted"):
            a.merge(b)
    with pytest.raises(TypeError, match=r"other: expected a bnfast.StandardScaler, got Moments"):
        scaler.merge(bnfast.moments(table()))
    for other in (1, None, "a"):
        with pytest.raises(TypeError):
            scaler + other
        with pytest.raises(TypeError):
            other + scaler


def test_a_memmap_in_batches(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(50_000, 20))
    x[:] = np.random.default_rng(0).normal(5, 2, x.shape)
    x.flush()
    x = np.memmap(tmp_path / "x", np.float32, "r", shape=x.shape)
    whole = StandardScaler().fit(np.array(x))
    by_parts = StandardScaler()
    for begin in range(0, len(x), 7_000):
        by_parts.partial_fit(x[begin : begin + 7_000])
    for scaler in (by_parts, StandardScaler().fit(x, batch_size=7_000), StandardScaler().fit(x)):
        assert_same_fit(scaler, whole, 2e-7)
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=x.shape)
    assert whole.transform(x, out=y) is y
    np.testing.assert_array_equal(y, whole.transform(np.array(x)))


def test_a_fit_in_batches_reads_no_more_than_a_batch_at_a_time(monkeypatch):
    seen = []
    moments = _core.moments
    monkeypatch.setattr(_core, "moments", lambda x, axis: seen.append(x.shape) or moments(x, axis))
    StandardScaler().fit(table(), batch_size=90)
    assert seen == [(90, 7), (90, 7), (20, 7)]


def test_progress_goes_to_the_error_stream(capsys):
    StandardScaler().fit(table(), batch_size=90, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.strip() for line in err.split("\r")]
    assert [line.split(" (")[0] for line in lines] == [
        "",
        *(f"StandardScaler: {n} of 200 rows" for n in (90, 180, 200)),
    ]
    assert "(100 %), 0 s left" in lines[-1]
    assert err.endswith("\n")
    StandardScaler().partial_fit(table(), progress=True)
    assert "200 of 200 rows" in capsys.readouterr().err
    StandardScaler().fit(table(), batch_size=90)
    assert capsys.readouterr().err == ""


# --- out, copy, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["transform", "inverse_transform", "fit_transform"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32])
def test_out(method, dtype, monkeypatch):
    monkeypatch.setattr("bnfast.scaling.data.CHUNK", 7 * 17)
    x = (table() / 100).astype(dtype)
    call = getattr(StandardScaler().fit(x), method)
    expected = call(x)
    assert expected is not x
    for order in "CF":
        out = np.empty_like(expected, order=order)
        assert call(x, out=out) is out
        np.testing.assert_array_equal(out, expected)
    if dtype is not np.int32:
        wide = np.zeros((len(x) + 1, x.shape[1]), x.dtype)
        for source, target in ((wide[:-1], wide[:-1]), (wide[:-1], wide[1:]), (wide[1:], wide[:-1])):
            source[:] = x
            assert call(source, out=target) is target
            np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("dtype", [np.float64, np.int64], ids=["kernel", "chunks"])
@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        (np.zeros((200, 6)), ValueError, r"out: expected shape \(200, 7\), got \(200, 6\)"),
        (np.zeros((200, 7), np.float32), TypeError, "out: expected dtype float64, got float32"),
        ([[0.0] * 7] * 200, TypeError, "out: expected a numpy.ndarray, got list"),
        (table(), ValueError, "out: expected a writeable array"),
        (np.ma.zeros((200, 7)), TypeError, "out: expected a numpy.ndarray, got MaskedArray"),
    ],
)
def test_an_out_that_does_not_fit(dtype, out, error, words):
    x = table().astype(dtype)
    scaler = StandardScaler().fit(table(10))
    before = state(scaler)
    for method in ("transform", "inverse_transform", "fit_transform"):
        with pytest.raises(error, match=words):
            getattr(scaler, method)(x, out=out)
    assert state(scaler) == before


def test_copy_false_writes_into_x_where_it_can():
    expected = StandardScaler().fit_transform(table())
    scaler = StandardScaler(copy=False)
    for dtype, tolerance in ((np.float64, FLOAT64), (np.float32, 1e-4), (np.float16, 1e-1)):
        x = table().astype(dtype)
        assert scaler.fit_transform(x) is x
        np.testing.assert_allclose(x, expected, rtol=tolerance, atol=tolerance)
    scaler.fit(table())
    for x in (table(), table().tolist(), table().astype(np.int64)):
        before = np.array(x)
        scaler.transform(x)
        np.testing.assert_array_equal(x, before)
    x = table().copy()
    assert StandardScaler().fit(x).transform(x, copy=False) is x
    assert scaler.inverse_transform(x) is x
    np.testing.assert_allclose(x, table(), rtol=1e-12, atol=1e-12)
    assert scaler.transform(x, copy=True) is not x


def test_x_is_not_touched_by_default():
    x = with_nan(table())
    before = x.tobytes()
    scaler = StandardScaler().fit(x, sample_weight=np.ones(200)).fit(x)
    scaler.fit_transform(x)
    scaler.inverse_transform(scaler.transform(x))
    assert x.tobytes() == before


def test_views_and_orders():
    x = table()
    scaler = StandardScaler().fit(x)
    expected = scaler.transform(x)
    wide = np.zeros((400, 14))
    wide[::2, ::2] = x
    for view in (wide[::2, ::2], np.asfortranarray(x), x[::-1][::-1]):
        np.testing.assert_array_equal(scaler.transform(view), expected)
    assert scaler.transform(np.asfortranarray(x)).flags.f_contiguous
    np.testing.assert_array_equal(scaler.transform(x[::-1]), expected[::-1])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("view", ["columns", "rows", "turned", "part"])
def test_of_a_view_with_gaps_a_chunk_is_copied_at_a_time(dtype, view):
    """Its whole is 3 MB and more; the result of transform aside, a tenth of it is used."""
    cut = {
        "columns": np.s_[:, ::2], "rows": np.s_[::2], "turned": np.s_[::-1], "part": np.s_[:, :50],
    }[view]  # fmt: skip
    wide = np.random.default_rng(0).normal(5, 2, (40_000, 60)).astype(dtype)
    x = wide[cut]
    out, dense = np.empty(x.shape, dtype), np.array(x)
    StandardScaler().fit(x[:100]).transform(x[:100])
    tracemalloc.start()
    try:
        scaler = StandardScaler().fit(x)
        scaler.transform(x, out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5e6 < x.nbytes
    assert_same_fit(scaler, StandardScaler().fit(dense), 3e-7 if dtype == np.float32 else FLOAT64)
    np.testing.assert_array_equal(out, scaler.transform(dense))
    np.testing.assert_array_equal(scaler.transform(x), out)
    assert scaler.transform(x, copy=False) is x
    np.testing.assert_array_equal(x, out)


@pytest.mark.parametrize("method", ["transform", "inverse_transform"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32])
def test_a_transform_in_batches_is_the_same(method, dtype, capsys):
    x = (table() / 100).astype(dtype)
    call = getattr(StandardScaler().fit(x), method)
    expected = call(x)
    np.testing.assert_array_equal(call(x, batch_size=37), expected)
    assert capsys.readouterr().err == ""
    out = np.empty_like(expected)
    assert call(x, out=out, batch_size=37, progress=True) is out
    np.testing.assert_array_equal(out, expected)
    assert "200 of 200 rows (100 %)" in capsys.readouterr().err
    np.testing.assert_array_equal(call(x, progress=True), expected)
    if dtype != np.int32:
        same = x.copy()
        assert call(same, copy=False, batch_size=37) is same
        np.testing.assert_array_equal(same, expected)
        wide = np.zeros((len(x) + 1, x.shape[1]), dtype)
        wide[:-1] = x
        np.testing.assert_array_equal(call(wide[:-1], out=wide[1:], batch_size=10), expected)
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        call(x, batch_size=0)


@pytest.mark.parametrize("method", ["transform", "inverse_transform"])
def test_in_batches_an_infinity_is_found_before_anything_is_written(method):
    x = table().copy()
    x[150, 3] = np.inf
    call = getattr(StandardScaler().fit(table()), method)
    out = np.full(x.shape, 7.0)
    for options in ({}, {"out": out}):
        with pytest.raises(ValueError, match="infinity"):
            call(x, batch_size=10, **options)
    assert (out == 7.0).all()


def test_a_memmap_larger_than_a_batch_into_another(tmp_path):
    shape = (30_000, 20)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    x[:] = np.random.default_rng(0).normal(5, 2, shape)
    z = np.memmap(tmp_path / "z", np.float32, "w+", shape=shape)
    scaler = StandardScaler().fit(x, batch_size=7_000)
    assert scaler.transform(x, out=z, batch_size=7_000) is z
    np.testing.assert_array_equal(z, scaler.transform(np.array(x)))


# --- bad input ------------------------------------------------------------------------------------------------


class Sparse:
    nnz = 1

    def toarray(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (Sparse(), ValueError, r"center sparse matrices: pass `with_mean=False` instead"),
        (np.ma.zeros((3, 7)), TypeError, r"X.filled\(numpy.nan\)"),
        (np.zeros((3, 7)).view(np.matrix), TypeError, "numpy.matrix"),
        (np.zeros((3, 7), complex), ValueError, "Complex data not supported"),
        (np.zeros((3, 7), "M8[s]"), TypeError, r"X: expected numbers, got dtype datetime64\[s\] in X"),
        (np.zeros((3, 7), "m8[s]"), TypeError, r"X: expected numbers, got dtype timedelta64\[s\] in X"),
        ([[1.0] * 6 + [datetime.date(2020, 1, 1)]], TypeError, "expected numbers, got date in column 6"),
        ([[np.timedelta64(1, "s")] + [1.0] * 6], TypeError, "expected numbers, got timedelta64 in column 0"),
        ([[1.0] * 6 + [np.datetime64("2020-01-01")]], TypeError, "expected numbers, got datetime64 in column 6"),
        ([[1.0] * 6 + [datetime.timedelta(1)]], TypeError, "expected numbers, got timedelta in column 6"),
        (np.array([[1.0] * 5 + ["a", 1.0]], object), ValueError, "X: column 5: could not convert string to float: 'a'"),
        (np.zeros(7), ValueError, "Expected 2D array, got 1D array instead:(.|\n)*Reshape your data"),
        (3.0, ValueError, "Expected 2D array, got scalar array instead"),
        (np.zeros((3, 7, 1)), ValueError, "Found array with dim 3, while dim <= 2 is required by StandardScaler"),
        (np.zeros((0, 7)), ValueError, r"0 sample\(s\) \(shape=\(0, 7\)\) while a minimum of 1 is required"),
        (np.zeros((3, 0)), ValueError, r"0 feature\(s\) \(shape=\(3, 0\)\) while a minimum of 1 is required"),
        ([["a"] * 7], ValueError, "could not convert string to float"),
        (np.array([[{}] * 7], object), TypeError, "float"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_data_leave_the_scaler_as_it_was(x, error, words):
    scaler = StandardScaler().fit(table())
    before = state(scaler)
    for method in ("fit", "partial_fit", "transform", "fit_transform", "inverse_transform"):
        with pytest.raises(error, match=words):
            getattr(scaler, method)(x)
        assert state(scaler) == before


def test_another_number_of_features():
    scaler = StandardScaler().fit(table())
    before = state(scaler)
    for method in ("partial_fit", "transform", "inverse_transform"):
        with pytest.raises(ValueError, match=r"X has 3 features, but StandardScaler is expecting 7 features as input"):
            getattr(scaler, method)(table(10, 3))
    assert state(scaler) == before
    assert scaler.fit(table(10, 3)).n_features_in_ == 3


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_at_least_one(batch_size):
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        StandardScaler().fit(table(), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1.5, True, "3"])
def test_batch_size_is_an_int(batch_size):
    with pytest.raises(TypeError, match="batch_size: expected an int"):
        StandardScaler().fit(table(), batch_size=batch_size)


@pytest.mark.parametrize("name", ["copy", "with_mean", "with_std"])
def test_parameters_are_bools_in_fit(name):
    scaler = StandardScaler(**{name: 1})
    with pytest.raises(TypeError, match=f"{name}: expected a bool, got 1"):
        scaler.fit(table())
    assert "n_features_in_" not in vars(scaler)
    StandardScaler(**{name: np.bool_(True)}).fit(table())


def test_a_parameter_that_was_changed_after_the_fit():
    scaler = StandardScaler(with_std=False).fit(table()).set_params(with_std=True)
    for method in ("transform", "inverse_transform", "partial_fit"):
        with pytest.raises(ValueError, match="expected an array, got None: with_mean or with_std has changed"):
            getattr(scaler, method)(table())


def test_before_fit():
    scaler = StandardScaler()
    for call in (scaler.transform, scaler.inverse_transform):
        with pytest.raises(ValueError, match=r"This StandardScaler instance is not fitted yet\. Call 'fit'"):
            call(table())
    with pytest.raises(AttributeError, match="not fitted yet"):
        scaler.get_feature_names_out()


# --- state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["fit", "partial_fit", "fit_transform"])
@pytest.mark.parametrize("place", ["moments", "affine", "merged", "batches_of"])
def test_an_exception_on_the_way_leaves_the_scaler_as_it_was(error, method, place, monkeypatch):
    scaler = StandardScaler().fit(table())
    before = state(scaler)

    def fails(*args):
        raise error

    monkeypatch.setattr(_core if place in ("moments", "affine") else module, place, fails)
    reached = (
        place
        in {
            "fit": ("moments", "batches_of"),
            "partial_fit": ("moments", "batches_of", "merged"),
            "fit_transform": ("moments", "affine"),
        }[method]
    )
    if reached:
        with pytest.raises(error):
            getattr(scaler, method)(table(50, seed=1))
        assert state(scaler) == before
    else:
        getattr(scaler, method)(table(50, seed=1))
        assert state(scaler) != before


def test_an_exception_in_a_later_batch_leaves_the_scaler_as_it_was():
    scaler = StandardScaler().fit(table())
    before = state(scaler)
    bad = table().copy()
    bad[-1, -1] = np.inf
    for call in (scaler.fit, scaler.partial_fit):
        with pytest.raises(ValueError, match="infinity"):
            call(bad, batch_size=10)
        assert state(scaler) == before


@pytest.mark.parametrize("method", ["partial_fit", "sparse"])
def test_threads_that_fit_one_scaler_lose_nothing(method):
    """Four threads, 200 batches each; without the lock, or the comparison after it, this one is short of thousands."""
    scaler, batch = StandardScaler(with_mean=False), np.random.default_rng(0).random((7, 3))
    if method == "sparse":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed: it scales sparse data")
        batch = pytest.importorskip("scipy.sparse").csr_array(batch)
    begin = threading.Barrier(4)

    def fit():
        begin.wait()
        for _ in range(200 if method == "partial_fit" else 20):
            scaler.partial_fit(batch)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=fit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert scaler.n_samples_seen_ == 4 * (200 if method == "partial_fit" else 20) * 7
    np.testing.assert_allclose(scaler.var_, StandardScaler(with_mean=False).fit(batch).var_, rtol=1e-12)


def test_a_first_fit_that_another_thread_overtakes_is_refused(monkeypatch):
    scaler = StandardScaler()

    def overtaken(*args):
        monkeypatch.undo()
        scaler.partial_fit(table(10, 3))
        return module.statistics(*args)

    monkeypatch.setattr(module, "statistics", overtaken)
    with pytest.raises(ValueError, match="X has 7 features, but StandardScaler is expecting 3 features"):
        scaler.partial_fit(table())
    assert scaler.n_samples_seen_ == 10


def test_fit_forgets_what_was_before():
    scaler = StandardScaler().fit(table(50, seed=1))
    scaler.feature_names_in_ = np.array(["a"] * 7, object)
    assert state(scaler.fit(table())) == state(StandardScaler().fit(table()))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("fitted", [False, True])
def test_pickle_and_copy(protocol, fitted):
    scaler = StandardScaler(copy=False)
    if fitted:
        scaler.fit(with_nan(table()))
    for again in (pickle.loads(pickle.dumps(scaler, protocol)), copy.copy(scaler), copy.deepcopy(scaler)):
        assert type(again) is StandardScaler
        assert state(again) == state(scaler)


def test_parameters_are_read_printed_and_set():
    scaler = StandardScaler(with_std=False)
    assert repr(scaler) == "StandardScaler(with_std=False)"
    assert repr(StandardScaler()) == "StandardScaler()"
    assert scaler.get_params() == {"copy": True, "with_mean": True, "with_std": False}
    assert scaler.set_params(copy=False, with_std=True) is scaler
    assert (scaler.copy, scaler.with_std) == (False, True)
    with pytest.raises(ValueError, match=r"Invalid parameter 'deep' for estimator StandardScaler\(copy=False\)"):
        scaler.set_params(copy=True, deep=1)
    assert scaler.copy is False
    with pytest.raises(TypeError):
        StandardScaler(False)


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_the_variance_with_other_divisors(ddof):
    x = with_nan(table())
    scaler = StandardScaler().fit(x)
    np.testing.assert_allclose(scaler.var(ddof), np.nanvar(x, axis=0, ddof=ddof), rtol=1e-13)
    assert (scaler.var() == scaler.var_).all()
    weighted = StandardScaler().fit(table(), sample_weight=np.arange(200) % 3)
    repeated = StandardScaler().fit(np.repeat(table(), np.arange(200) % 3, axis=0))
    np.testing.assert_allclose(weighted.var(ddof), repeated.var(ddof), rtol=1e-12)


def test_the_variance_where_there_is_none():
    assert np.isnan(StandardScaler().fit([[1.0, 2.0]]).var(1)).all()
    with pytest.raises(ValueError, match="not fitted"):
        StandardScaler().var()
    with pytest.raises(ValueError, match="var_: expected an array, got None"):
        StandardScaler(with_std=False).fit(table()).var()


def test_a_subclass_stays_one():
    class Mine(StandardScaler):
        pass

    scaler = Mine().fit(table())
    assert type(scaler + scaler) is Mine
    assert repr(scaler) == "Mine()"


# --- names ----------------------------------------------------------------------------------------------------


class Frame:
    """As much of a data frame as the scaler looks at."""

    def __init__(self, x, columns):
        self.x, self.columns = x, columns

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype)


def test_names_of_features():
    x = table(20, 2)
    scaler = StandardScaler().fit(Frame(x, ["a", "b"]))
    assert scaler.feature_names_in_.tolist() == ["a", "b"]
    assert scaler.feature_names_in_.dtype == object
    assert scaler.get_feature_names_out().tolist() == ["a", "b"]
    assert scaler.get_feature_names_out(["a", "b"]).tolist() == ["a", "b"]
    scaler.transform(Frame(x, ["a", "b"]))
    scaler.partial_fit(Frame(x, ["a", "b"]))
    assert scaler.feature_names_in_.tolist() == ["a", "b"]
    for method in ("transform", "partial_fit"):
        with pytest.raises(ValueError, match="in the same order as they were in fit"):
            getattr(scaler, method)(Frame(x, ["b", "a"]))
        with pytest.raises(
            ValueError, match="unseen at fit time:\n- c\nFeature names seen at fit time, yet now missing:\n- b"
        ):
            getattr(scaler, method)(Frame(x, ["a", "c"]))
        with pytest.warns(UserWarning, match="X does not have valid feature names, but StandardScaler was fitted with"):
            getattr(scaler, method)(x)
    assert scaler.fit_transform(Frame(x, ["c", "d"])).shape == x.shape
    assert scaler.feature_names_in_.tolist() == ["c", "d"]
    scaler.fit(x)
    assert not hasattr(scaler, "feature_names_in_")
    assert scaler.get_feature_names_out().tolist() == ["x0", "x1"]
    assert scaler.get_feature_names_out(["p", "q"]).tolist() == ["p", "q"]
    with pytest.raises(ValueError, match=r"should have length equal to number of features \(2\), got 1"):
        scaler.get_feature_names_out(["p"])
    with pytest.warns(UserWarning, match="X has feature names, but StandardScaler was fitted without"):
        scaler.transform(Frame(x, ["a", "b"]))


def test_names_that_are_no_strings():
    x = table(20, 2)
    assert not hasattr(StandardScaler().fit(Frame(x, [0, 1])), "feature_names_in_")
    with pytest.raises(TypeError, match="only supported if all input features have string names"):
        StandardScaler().fit(Frame(x, ["a", 1]))


# --- without scikit-learn -------------------------------------------------------------------------------------


def test_without_scikit_learn():
    """Everything but what is scikit-learn's; and nothing imports it on its own."""
    script = """
import sys
import numpy as np
import bnfast
x = np.array([[1.0, 2.0], [3.0, 6.0]])
scaler = bnfast.StandardScaler().fit(x).partial_fit(x)
assert scaler.fit_transform(x).tolist() == scaler.transform(x).tolist() == [[-1, -1], [1, 1]]
assert (scaler + scaler).n_samples_seen_ == 4
assert repr(scaler) == "StandardScaler()" and scaler._repr_html_() is None
assert scaler.get_feature_names_out().tolist() == ["x0", "x1"]
scaler.set_params(with_mean=False)
assert not {name.partition(".")[0] for name in sys.modules} & {"sklearn", "scipy", "pandas", "joblib"}
sys.modules["sklearn"] = None
scaler.transform(x)
try:
    bnfast.StandardScaler().transform(x)
except ValueError as error:
    assert isinstance(error, AttributeError) and "not fitted" in str(error)
try:
    scaler.set_output(transform="pandas")
except ImportError:
    print("as it should be")
"""
    assert run_script(script) == "as it should be"


# --- beside scikit-learn --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sklearn():
    return pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def release(sklearn):
    return tuple(int(number) for number in sklearn.__version__.split(".")[:2])


@pytest.fixture
def theirs(sklearn):
    from sklearn.preprocessing import StandardScaler

    return StandardScaler


@pytest.fixture
def pandas():
    return pytest.importorskip("pandas", reason="pandas is not installed")


def case_far(x):
    return x + 1e6


def case_constant(x):
    x = x.copy()
    x[:, 1], x[:, 2], x[:, 3] = 0.0, 0.1, -1e9
    return x


def case_nearly_constant(x):
    x = x.copy()
    x[:, 0] = 1e9 + 1e-7 * x[:, 0]
    x[:, 1] = 1 + 1e-14 * x[:, 1]
    return x


CASES = {
    "plain": lambda x: x,
    "nan": with_nan,
    "nan_everywhere": functools.partial(with_nan, columns=slice(None)),
    "one_row": lambda x: x[:1],
    "two_rows": lambda x: x[:2],
    "one_feature": lambda x: x[:, :1],
    "fortran": np.asfortranarray,
    "strided": lambda x: x[::3, ::2],
    "far": case_far,
    "constant": case_constant,
    "nearly_constant": case_nearly_constant,
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize(
    "parameters", [{}, {"with_mean": False}, {"with_std": False}, {"with_mean": False, "with_std": False}]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_as_scikit_learn(theirs, parameters, case, weighted):
    if weighted and len(parameters) == 2:
        pytest.skip("without mean and std scikit-learn counts samples, not weights")
    if weighted and case.endswith("constant"):
        pytest.skip("scikit-learn's variance of constant features with weights is rounding errors, negative at times")
    x = CASES[case](table())
    weights = np.random.default_rng(3).random(len(x)) if weighted else None
    mine, other = StandardScaler(**parameters), theirs(**parameters)
    z = mine.fit(x, sample_weight=weights).transform(x)
    expected = other.fit(x, sample_weight=weights).transform(x)
    # far from zero, float64 sums of the data themselves, which scikit-learn takes, are off by this much
    tolerance = {"far": 1e-9, "nearly_constant": 1e-6}.get(case, 1e-12)
    assert_same_fit(mine, other, tolerance)
    assert z.dtype == expected.dtype
    assert z.flags.f_contiguous == expected.flags.f_contiguous
    np.testing.assert_allclose(z, expected, rtol=tolerance, atol=tolerance)
    back = mine.inverse_transform(z)
    np.testing.assert_allclose(back, other.inverse_transform(expected), rtol=tolerance, atol=tolerance)
    once = StandardScaler(**parameters).fit_transform(x, sample_weight=weights)
    np.testing.assert_allclose(once, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["plain", "nan", "constant"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8", "bool", "object"])
def test_the_same_dtypes_as_scikit_learn(theirs, case, dtype):
    x = CASES[case](table() / 100)
    if dtype in ("int32", "uint8", "bool"):
        x = np.nan_to_num(np.abs(x)).astype(dtype)
    else:
        x = np.clip(x, -1e4, 1e4).astype(dtype)
    mine, other = StandardScaler().fit(x), theirs().fit(x)
    assert_same_fit(mine, other, 1e-6 if dtype == "float32" else 1e-12)
    for method in ("transform", "inverse_transform"):
        found, expected = getattr(mine, method)(x), getattr(other, method)(x)
        assert found.dtype == expected.dtype
        # theirs rounds mean and scale to the dtype first
        tolerance = {"float16": 4e-3, "float32": 2e-6}.get(dtype, 1e-12)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 5, [100, 100], [3, 0.5, 150]])
def test_the_same_parts_as_scikit_learn(theirs, missing, weighted, sizes):
    x = with_nan(table()) if missing else table()
    mine, other = StandardScaler(), theirs()
    begin = 0
    for size in sizes:
        part = x[begin : begin + int(size) + 1]
        begin += int(size) + 1
        if np.isnan(part).all(0).any():
            continue  # scikit-learn's mean would stay NaN
        weights = np.linspace(0.1, 2, len(part)) if weighted else None
        mine.partial_fit(part, sample_weight=weights)
        other.partial_fit(part, sample_weight=weights)
        assert_same_fit(mine, other, 1e-11)


def test_more_accurate_than_scikit_learn_far_from_zero(sklearn, theirs):
    if release(sklearn) < (1, 8):
        pytest.skip("scikit-learn before 1.8 does not round the mean")
    x = np.random.default_rng(0).normal(1e9, 1e3, (20_000, 2)).astype(np.float32)
    mean, var = definition(x)
    exact = (x.astype(np.longdouble) - mean) / np.sqrt(var)
    error = {scaler: np.abs(scaler().fit_transform(x) - exact).max() for scaler in (StandardScaler, theirs)}
    assert error[StandardScaler] < 2e-6
    assert error[theirs] > 1e-3  # or this test has lost its reason


def test_check_estimator(sklearn):
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not inherit from BaseEstimator, and what the checks provoke
        # not copy=False: in some checks the same data are transformed twice, and scikit-learn's own scaler fails them
        for parameters in ({}, {"with_mean": False}, {"with_std": False}):
            check_estimator(StandardScaler(**parameters))


def test_clone_and_tags(sklearn):
    if release(sklearn) < (1, 6):
        pytest.skip("scikit-learn before 1.6 has other tags")
    from sklearn.base import clone
    from sklearn.utils import get_tags
    from sklearn.utils.validation import check_is_fitted

    scaler = StandardScaler(with_std=False).set_output(transform="pandas").fit(table())
    cloned = clone(scaler)
    assert type(cloned) is StandardScaler
    assert repr(cloned) == repr(scaler)
    assert not hasattr(cloned, "mean_")
    assert cloned._sklearn_output_config == {"transform": "pandas"}
    tags = get_tags(scaler)
    assert tags.input_tags.allow_nan
    assert not tags.input_tags.sparse
    assert tags.transformer_tags.preserves_dtype == ["float64", "float32"]
    check_is_fitted(scaler)
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        check_is_fitted(cloned)
    with pytest.raises(NotFittedError):
        cloned.transform(table())


def regression(x):
    return x @ np.arange(1.0, x.shape[1] + 1) / 1000


def test_in_a_pipeline_and_a_search(sklearn, theirs):
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    x = table()
    predictions = []
    for scaler in (StandardScaler, theirs):
        pipeline = make_pipeline(scaler(), Ridge())
        grid = {"standardscaler__with_mean": [True, False], "standardscaler": [scaler(), scaler(with_std=False)]}
        search = GridSearchCV(pipeline, grid, cv=3).fit(x, regression(x))
        predictions.append(search.predict(x))
        assert type(search.best_estimator_[0]) is scaler
        pipeline.fit(x, regression(x), standardscaler__sample_weight=np.arange(200.0))
        predictions.append(pipeline.predict(x))
        assert pipeline[:1].get_feature_names_out().tolist() == [f"x{i}" for i in range(7)]
    np.testing.assert_allclose(predictions[0], predictions[2], rtol=1e-10)
    np.testing.assert_allclose(predictions[1], predictions[3], rtol=1e-10)


def test_a_pipeline_that_keeps_its_output_in_a_cache_or_runs_in_processes(sklearn, tmp_path):
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    x = table()
    expected = cross_val_score(make_pipeline(StandardScaler(), Ridge()), x, regression(x), cv=2)
    cached = make_pipeline(StandardScaler(), Ridge(), memory=str(tmp_path))
    np.testing.assert_allclose(cross_val_score(cached, x, regression(x), cv=2), expected)


def test_in_a_column_transformer(sklearn, theirs, pandas):
    from sklearn.compose import ColumnTransformer

    frame = pandas.DataFrame(table(50, 4), columns=list("abcd"))
    outputs = []
    for scaler in (StandardScaler, theirs):
        transformer = ColumnTransformer([("s", scaler(), ["a", "c"])], remainder="passthrough")
        outputs.append(transformer.set_output(transform="pandas").fit_transform(frame))
        assert transformer.get_feature_names_out().tolist() == ["s__a", "s__c", "remainder__b", "remainder__d"]
    pandas.testing.assert_frame_equal(*outputs, rtol=1e-12)


def test_set_output(sklearn, pandas):
    frame = pandas.DataFrame(table(10, 3), columns=list("abc"), index=range(5, 15))
    scaler = StandardScaler().fit(frame)
    assert type(scaler.transform(frame)) is np.ndarray
    assert scaler.set_output(transform="pandas") is scaler
    assert scaler.set_output() is scaler
    for y in (
        scaler.transform(frame),
        scaler.fit_transform(frame),
        pickle.loads(pickle.dumps(scaler)).transform(frame),
    ):
        assert y.columns.tolist() == list("abc")
        assert y.index.tolist() == list(range(5, 15))
    out = np.empty(frame.shape)
    assert scaler.transform(frame, out=out) is out
    assert type(scaler.inverse_transform(frame)) is np.ndarray
    assert type(scaler.set_output(transform="default").transform(frame)) is np.ndarray
    with sklearn.config_context(transform_output="pandas"):
        assert StandardScaler().fit_transform(frame).columns.tolist() == list("abc")
    before = state(scaler.set_output(transform="nonsense"))
    with pytest.raises(ValueError, match="output config must be in"):
        scaler.fit_transform(2 * frame)
    assert state(scaler) == before


def test_set_output_of_inverse_transform(sklearn, pandas):
    frame = pandas.DataFrame(table(10, 3), columns=list("abc"), index=range(5, 15))
    scaler = StandardScaler().fit(frame).set_output(transform="pandas", inverse_transform="pandas")
    back = scaler.inverse_transform(scaler.transform(frame))
    pandas.testing.assert_frame_equal(back, frame)
    assert scaler.inverse_transform(np.zeros((2, 3))).columns.tolist() == list("abc")
    out = np.empty(frame.shape)
    assert scaler.inverse_transform(frame, out=out) is out
    scaler.set_output(inverse_transform="default")
    assert type(scaler.inverse_transform(frame)) is np.ndarray
    assert type(scaler.transform(frame)) is pandas.DataFrame
    with sklearn.config_context(transform_output="pandas"):
        assert type(StandardScaler().fit(frame).inverse_transform(frame)) is np.ndarray  # as scikit-learn's


def test_callbacks(sklearn):
    if release(sklearn) < (1, 9):
        pytest.skip("scikit-learn before 1.9 has no callbacks")

    class Recorder:
        def __init__(self):
            self.seen = []

        def setup(self, estimator, context):
            self.seen.append("setup")

        def teardown(self, estimator, context):
            self.seen.append("teardown")

        def on_fit_task_begin(self, estimator, context, *, X, metadata):
            self.seen.append(("begin", X.shape, metadata))

        def on_fit_task_end(self, estimator, context, *, fitted_estimator):
            self.seen.append(("end", fitted_estimator.mean_.tolist()))

    x, recorder = table(10, 2), Recorder()
    scaler = StandardScaler().set_callbacks(recorder)
    before = vars(scaler).keys()
    means = StandardScaler().fit(x).mean_.tolist()
    one = ["setup", ("begin", (10, 2), {"sample_weight": None}), ("end", means), "teardown"]
    for method in ("fit", "partial_fit", "fit_transform"):
        recorder.seen.clear()
        getattr(scaler, method)(x)
        assert [entry[0] for entry in recorder.seen] == [entry[0] for entry in one]
        if method != "partial_fit":
            assert recorder.seen == one
    assert vars(scaler).keys() - before == set(FITTED) | {"n_features_in_"}
    assert sklearn.base.clone(scaler)._skl_callbacks == [recorder]
    recorder.seen.clear()
    state_before = state(scaler)
    with pytest.raises(ValueError, match="infinity"):
        scaler.fit(x * np.inf)
    assert recorder.seen[-1] == "teardown"
    assert state(scaler) == state_before
    recorder.on_fit_task_end = lambda estimator, context: 1 / 0
    with pytest.raises(ZeroDivisionError):
        scaler.fit(2 * x)
    assert state(scaler) == state_before
    with pytest.raises(TypeError, match="FitCallback"):
        scaler.set_callbacks(3)
    assert not scaler.set_callbacks()._has_callbacks()


def dates_beside_numbers():
    days = [datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)]
    return {
        "date": days,
        "datetime": [datetime.datetime(day.year, 1, 1) for day in days],
        "with a zone": [datetime.datetime(day.year, 1, 1, tzinfo=datetime.UTC) for day in days],
        "duration": [datetime.timedelta(1), datetime.timedelta(2)],
        "time": [datetime.time(1), datetime.time(2)],
    }


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
@pytest.mark.parametrize("kind", dates_beside_numbers())
@pytest.mark.parametrize("alone", [False, True])
def test_dates_are_refused_by_the_name_of_their_column(library, kind, alone):
    frames = pytest.importorskip(library, reason=f"{library} is not installed")
    columns = (
        {"when": dates_beside_numbers()[kind]} if alone else {"a": [1.0, 2.0], "when": dates_beside_numbers()[kind]}
    )
    frame = frames.table(columns) if library == "pyarrow" else frames.DataFrame(columns)
    with pytest.raises(TypeError, match=r"X: expected numbers, got .* in column 'when'; make numbers of it first"):
        StandardScaler().fit(frame)


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_a_column_of_strings_is_named(library):
    frames = pytest.importorskip(library, reason=f"{library} is not installed")
    columns = {"a": [1.0, 2.0], "city": ["Bonn", "Kiel"]}
    frame = frames.table(columns) if library == "pyarrow" else frames.DataFrame(columns)
    with pytest.raises(ValueError, match="X: column 'city': could not convert string to float: 'Bonn'"):
        StandardScaler().fit(frame)


@pytest.mark.parametrize("routing", [False, True])
def test_metadata_routing(sklearn, routing):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import make_scorer, r2_score
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    x, weights = table(), np.arange(200.0)
    with sklearn.config_context(enable_metadata_routing=routing):
        if not routing:
            with pytest.raises(RuntimeError, match="only available when metadata routing is enabled"):
                StandardScaler().set_fit_request(sample_weight=True)
            return
        scaler = StandardScaler().set_fit_request(sample_weight=True)
        assert scaler.set_transform_request(copy=False) is scaler
        ridge = Ridge().set_fit_request(sample_weight=False)
        pipeline = make_pipeline(scaler, ridge)
        pipeline.fit(x, regression(x), sample_weight=weights)
        assert_same_fit(pipeline[0], StandardScaler().fit(x, sample_weight=weights))
        scoring = make_scorer(r2_score).set_score_request(sample_weight=False)
        search = GridSearchCV(pipeline, {"ridge__alpha": [1.0, 2.0]}, scoring=scoring, cv=2)
        search.fit(x, regression(x), sample_weight=weights)
        assert_same_fit(search.best_estimator_[0], pipeline[0])
        pipeline[0].set_fit_request(sample_weight="other")
        pipeline.fit(x, regression(x), other=weights)
        assert_same_fit(pipeline[0], StandardScaler().fit(x, sample_weight=weights))
        with pytest.raises(ValueError, match="sample_weight"):
            make_pipeline(StandardScaler(), Ridge()).fit(x, regression(x), sample_weight=weights)


def test_routing_requests_are_those_of_scikit_learn(sklearn, theirs):
    own, other = StandardScaler().get_metadata_routing(), theirs().get_metadata_routing()
    for method in ("fit", "partial_fit", "transform", "inverse_transform", "fit_transform"):
        assert getattr(own, method).requests == getattr(other, method).requests
    with sklearn.config_context(enable_metadata_routing=True):
        for method, parameter in (("partial_fit", "sample_weight"), ("inverse_transform", "copy")):
            name = f"set_{method}_request"
            mine, others = (getattr(s, name)(**{parameter: True}) for s in (StandardScaler(), theirs()))
            found, expected = (getattr(s.get_metadata_routing(), method).requests for s in (mine, others))
            assert found == expected == {parameter: True}
            again = getattr(mine, name)()
            assert getattr(again.get_metadata_routing(), method).requests == expected


def test_the_diagram_of_a_notebook(sklearn):
    from sklearn.pipeline import make_pipeline
    from sklearn.utils import estimator_html_repr

    scaler = StandardScaler(with_std=False)
    assert "StandardScaler(with_std=False)" in scaler._repr_html_()
    assert "StandardScaler" in estimator_html_repr(make_pipeline(scaler.fit(table())))


def test_frames_of_pandas(pandas):
    x = table(30, 3)
    frame = pandas.DataFrame(x, columns=list("abc"))
    plain = StandardScaler().fit(x)
    scaler = StandardScaler().fit(frame)
    assert scaler.feature_names_in_.tolist() == list("abc")
    assert_same_fit(scaler, plain)
    np.testing.assert_allclose(scaler.transform(frame), plain.transform(x), rtol=FLOAT64, atol=FLOAT64)
    assert StandardScaler().fit_transform(frame.astype(np.float32)).dtype == np.float32
    mixed = pandas.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 4.0], "c": [True, False, True]})
    assert_same_fit(StandardScaler().fit(mixed), StandardScaler().fit(mixed.to_numpy(np.float64)))
    nullable = pandas.DataFrame({"a": pandas.array([1, None, 3], "Int64"), "b": pandas.array([1, 2, 6], "Float32")})
    scaler = StandardScaler().fit(nullable)
    assert scaler.n_samples_seen_.tolist() == [2, 3]
    assert scaler.mean_.tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="Expected a 2-dimensional container but got"):
        scaler.fit(frame["a"])
    with pytest.raises(ValueError, match="could not convert string to float"):
        scaler.fit(pandas.DataFrame({"a": ["x", "y"]}))


def test_columns_of_strings_and_numbers_are_refused_as_scikit_learn_does(theirs, pandas):
    frame = pandas.DataFrame(table(5, 2), columns=["a", 1])
    for scaler in (StandardScaler(), theirs()):
        with pytest.raises(TypeError, match="Feature names are only supported if all input features have string names"):
            scaler.fit(frame)


def test_the_guides_recipe_for_parquet(sklearn, pandas, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow has no parquet here")
    guide = ROOT / "docs" / "guide" / "scaling.md"
    if not guide.is_file():
        pytest.skip("there is no guide here")
    recipe = next(block for block in guide.read_text(encoding="utf-8").split("```py\n") if "ParquetFile" in block)
    frame = pandas.DataFrame(table(5_000, 3), columns=list("abc"))
    frame["b"] = frame["b"].astype(np.float32)
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.Table.from_pandas(frame), "data.parquet")
    scaler = StandardScaler()
    exec(recipe.split("```")[0].replace("100_000", "700"), {"scaler": scaler})
    assert scaler.n_samples_seen_ == 5_000
    assert scaler.feature_names_in_.tolist() == list("abc")
    found = pandas.read_parquet("scaled.parquet")
    assert found.dtypes.tolist() == frame.dtypes.tolist()
    np.testing.assert_allclose(found, StandardScaler().fit_transform(frame), rtol=1e-5, atol=1e-6)
