"""Sparse data, which scikit-learn's scaler scales where it is installed."""

import copy

import numpy as np
import pytest
from scripts import run_script

from bnfast import StandardScaler

scipy_sparse = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")

FITTED = ("mean_", "var_", "scale_", "n_samples_seen_", "n_features_in_")
FORMATS = ["csr_array", "csc_array", "coo_array", "csr_matrix", "csc_matrix"]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("sklearn.preprocessing", reason="scikit-learn is not installed").StandardScaler


def data(dtype=np.float64, missing=False):
    x = np.random.default_rng(0).normal(3, 2, (60, 5)) * (np.random.default_rng(1).random((60, 5)) < 0.4)
    x[:, 3] = 0.0  # constant
    if missing:
        x[3, 0] = x[7, 2] = np.nan
    return x.astype(dtype)


def assert_same(found, expected):
    for name in FITTED:
        a, b = getattr(found, name), getattr(expected, name)
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert type(a) is type(b), name
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None), name


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
@pytest.mark.parametrize("with_std", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_attributes_and_results_are_scikit_learns(theirs, form, dtype, with_std, weighted, missing):
    if missing and dtype is np.int64:
        pytest.skip("integers have no NaN")
    x = getattr(scipy_sparse, form)(data(dtype, missing))
    weights = np.random.default_rng(2).random(60) if weighted else None
    ours, other = (scaler(with_mean=False, with_std=with_std) for scaler in (StandardScaler, theirs))
    assert ours.fit(x, sample_weight=weights) is ours
    assert_same(ours, other.fit(x, sample_weight=weights))
    for method in ("transform", "inverse_transform"):
        found, expected = getattr(ours, method)(x), getattr(other, method)(x)
        assert type(found) is type(expected)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.toarray(), expected.toarray())
    found = StandardScaler(with_mean=False, with_std=with_std).fit_transform(x, sample_weight=weights)
    np.testing.assert_array_equal(found.toarray(), ours.transform(x).toarray())
    ours.partial_fit(x[:9] if form.startswith("csr") else x)
    other.partial_fit(x[:9] if form.startswith("csr") else x)
    assert_same(ours, other)


def test_what_was_given_stays_and_copy_false_writes(theirs):
    x = scipy_sparse.csr_array(data())
    before = x.toarray()
    scaler = StandardScaler(with_mean=False).fit(x)
    scaler.transform(x)
    np.testing.assert_array_equal(x.toarray(), before)
    z = scaler.transform(x, copy=False)
    np.testing.assert_array_equal(x.toarray(), z.toarray())


@pytest.mark.parametrize("missing", [False, True])
def test_parts_batches_and_merging(theirs, missing):
    x = data(missing=missing)
    whole = theirs(with_mean=False).fit(scipy_sparse.csr_array(x))
    parts = [scipy_sparse.csr_array(x[rows]) for rows in (slice(0, 20), slice(20, 30), slice(30, 60))]
    make = StandardScaler(with_mean=False)
    by_parts = copy.copy(make)
    for part in parts:
        by_parts.partial_fit(part)
    mixed = copy.copy(make).partial_fit(parts[0]).partial_fit(x[20:30]).partial_fit(parts[2])
    weights = np.ones(60)
    for found in (
        by_parts,
        mixed,
        sum(copy.copy(make).fit(part) for part in parts),
        copy.copy(make).fit(parts[0]).merge(copy.copy(make).fit(x[20:])),
        copy.copy(make).fit(scipy_sparse.csc_array(x), batch_size=7),
        copy.copy(make).fit(scipy_sparse.coo_array(x), sample_weight=weights, batch_size=7),
    ):
        for name in FITTED:
            np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-12, err_msg=name)


def test_dense_data_after_sparse_and_back(theirs):
    x = data()
    scaler = StandardScaler(with_mean=False).fit(scipy_sparse.csr_array(x))
    np.testing.assert_allclose(scaler.transform(x), scaler.transform(scipy_sparse.csr_array(x)).toarray(), rtol=1e-15)
    assert scaler.fit(x).transform(scipy_sparse.csr_array(x)).nnz == np.count_nonzero(x)


@pytest.mark.parametrize("form", FORMATS)
def test_centring_is_refused_as_scikit_learn_does(theirs, form):
    x = getattr(scipy_sparse, form)(data())
    for scaler in (StandardScaler().fit(data()), theirs().fit(data())):
        before = dict(vars(scaler))
        for method in ("fit", "partial_fit", "fit_transform", "transform"):
            with pytest.raises(ValueError, match=r"Cannot center sparse matrices: pass `with_mean=False` instead"):
                getattr(scaler, method)(x)
            if isinstance(scaler, StandardScaler):
                assert vars(scaler) == before
            else:
                scaler.fit(data())
        with pytest.raises(ValueError, match="Cannot uncenter sparse matrices"):
            scaler.inverse_transform(x)


def test_bad_input_leaves_the_scaler_as_it_was(theirs):
    x = scipy_sparse.csr_array(data())
    scaler = StandardScaler(with_mean=False).fit(x)
    before = dict(vars(scaler))
    bad = x.copy()
    bad.data[0] = np.inf
    for call, words in (
        (lambda: scaler.fit(bad), "infinity"),
        (lambda: scaler.partial_fit(x[:, :3]), "X has 3 features"),
        (lambda: scaler.fit(x, sample_weight=-np.ones(60)), "at least 0"),
        (lambda: scaler.fit(x, batch_size=0), "batch_size"),
        (lambda: scaler.transform(x[:, :3]), "X has 3 features"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
        assert vars(scaler) == before
    with pytest.raises(TypeError, match="out: expected None, as X is sparse"):
        scaler.transform(x, out=np.empty(x.shape))
    with pytest.raises(ValueError, match="not fitted"):
        StandardScaler(with_mean=False).transform(x)


def test_without_scikit_learn_the_error_says_what_is_missing():
    script = """
import sys
sys.modules["sklearn"] = None
import numpy as np, scipy.sparse, bnfast
try:
    bnfast.StandardScaler(with_mean=False).fit(scipy.sparse.csr_array(np.eye(3)))
except TypeError as error:
    print(error)
"""
    assert "scikit-learn, which scales sparse data, is not installed; use X.toarray()" in run_script(script)


def test_ours_in_scikit_learns_place_still_finds_it(theirs, monkeypatch):
    import sklearn.preprocessing

    monkeypatch.setattr(sklearn.preprocessing, "StandardScaler", StandardScaler)
    x = scipy_sparse.csr_array(data())
    assert_same(StandardScaler(with_mean=False).fit(x), theirs(with_mean=False).fit(x))
