"""Moments and scaling of dask's collections: any chunks, every scheduler, computed once, lazy afterwards."""

import numpy as np
import pytest
from scripts import run_script

import bnfast
from bnfast import StandardScaler

dask = pytest.importorskip("dask", reason="needs dask: pip install bnfast[dask]")
da = pytest.importorskip("dask.array")

import bnfast.dask  # noqa: E402

MEANS = [0.0, 1e5, 1e6 + 0.3]


def data(shape=(3000, 7), mean=1e5, dtype=np.float32):
    return (np.random.default_rng(0).standard_normal(shape) + mean).astype(dtype)


def check(m, x, limit=1e-13):
    wide = x.astype(np.longdouble)
    var = wide.var(0)
    assert m.count == len(x)
    assert (abs(m.var() / var - 1) <= limit).all()
    assert (abs(m.mean - wide.mean(0)) <= limit * np.sqrt(var) + np.spacing(abs(m.mean))).all()


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("chunks", [(300, 7), (3000, 7), (77, 2), (-1, 1)])
@pytest.mark.parametrize("ordered", [False, True])
def test_moments_of_any_chunks_are_exact(mean, chunks, ordered):
    x = data(mean=mean)
    if ordered:
        x.sort(axis=0)
    check(bnfast.dask.moments(da.from_array(x, chunks=chunks)).compute(scheduler="sync"), x)


def test_every_scheduler_gives_the_same_bits():
    lazy = bnfast.dask.moments(da.from_array(data((400, 5)), chunks=(50, 3)))
    rows = [lazy.compute(scheduler=name).to_row() for name in ("sync", "threads", "processes")]
    assert rows[0].tobytes() == rows[1].tobytes() == rows[2].tobytes()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_any_axis(axis):
    x = data((12, 10, 8), 3, np.float64)
    m = bnfast.dask.moments(da.from_array(x, chunks=(5, 3, 4)), axis=axis).compute(scheduler="sync")
    whole = bnfast.moments(x, axis=axis)
    np.testing.assert_allclose(m.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(m.m2, whole.m2, rtol=1e-13)


def test_chunks_are_read_once_and_lazily():
    reads = []
    blocks = [dask.delayed(lambda i=i: reads.append(i) or np.full((4, 2), float(i)))() for i in range(20)]
    array = da.concatenate([da.from_delayed(block, (4, 2), np.float64) for block in blocks])
    lazy = bnfast.dask.moments(array)
    assert reads == []
    assert lazy.compute(scheduler="sync").count == 80
    assert sorted(reads) == list(range(20))


def test_unknown_sizes_and_empty_chunks():
    array = da.from_array(data((100, 3), 0), chunks=(10, 3))
    kept = array[array[:, 0] > 1.0]
    m = bnfast.dask.moments(kept).compute(scheduler="sync")
    expected = bnfast.moments(np.asarray(kept.compute(scheduler="sync")))
    np.testing.assert_allclose(m.var(), expected.var(), rtol=1e-12)


@pytest.mark.parametrize("widths", [(0, 2), (1, 0, 1), (2, 0)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_a_chunk_without_channels_counts_for_nothing(dtype, widths):
    x = data((6, 2), 0, np.float64) * 10
    array = da.from_array(x.astype(dtype), chunks=((2, 4), widths))
    if dtype in ("float32", "float64"):
        assert bnfast.dask.moments(array).compute(scheduler="sync").count == 6
    scaler = StandardScaler().fit(array)
    assert scaler.n_samples_seen_ == 6
    z = scaler.transform(array).compute(scheduler="sync")
    np.testing.assert_allclose(z, StandardScaler().fit_transform(x.astype(dtype)), rtol=1e-6)


def test_an_array_without_columns_is_refused():
    with pytest.raises(ValueError, match="got none"):
        StandardScaler().fit(da.ones((4, 0)))


@pytest.mark.parametrize(
    ("give", "error", "words"),
    [
        (lambda: np.ones((3, 2)), TypeError, "dask.array.Array, got ndarray"),
        (lambda: da.ones((3, 2), dtype=int), TypeError, "float32 or float64, got int64"),
        (lambda: da.ones(3), ValueError, "at least 2 dimensions"),
    ],
)
def test_wrong_arrays_are_refused(give, error, words):
    with pytest.raises(error, match=words):
        bnfast.dask.moments(give())
    with pytest.raises(np.exceptions.AxisError):
        bnfast.dask.moments(da.ones((3, 2)), axis=2)


def test_a_layer_uses_them():
    x = data((500, 3), 5)
    bn = bnfast.BatchNorm(3).use_statistics(bnfast.dask.moments(da.from_array(x, chunks=100)).compute())
    np.testing.assert_allclose(bn.running_var, x.astype(np.float64).var(0, ddof=1), rtol=1e-12)


# --- the scaler ---


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("chunks", [(300, 7), (77, 2)])
def test_the_scaler_of_arrays(mean, chunks):
    x = data(mean=mean)
    array = da.from_array(x, chunks=chunks)
    ours, whole = StandardScaler().fit(array), StandardScaler().fit(x)
    wide = x.astype(np.longdouble)
    assert (abs(ours.var_ / wide.var(0) - 1) <= 1e-13).all()
    assert ours.n_samples_seen_ == whole.n_samples_seen_
    z = ours.transform(array)
    assert isinstance(z, da.Array)
    assert z.chunks == array.chunks
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.compute(), whole.transform(x), atol=1e-6)
    back = ours.inverse_transform(z)
    assert back.chunks == array.chunks
    np.testing.assert_allclose(back.compute(), x, rtol=2e-7, atol=1e-6)
    parts = StandardScaler()
    for half in (array[:1000], array[1000:]):
        parts.partial_fit(half)
    np.testing.assert_allclose(parts.var_, whole.var_, rtol=1e-10)
    np.testing.assert_allclose(StandardScaler().fit_transform(array).compute(), z.compute())


def test_integers_and_missing_values():
    x = np.arange(30).reshape(10, 3)
    z = StandardScaler().fit_transform(da.from_array(x, chunks=4))
    assert z.dtype == np.float64
    np.testing.assert_allclose(z.compute(), StandardScaler().fit_transform(x))
    y = data((50, 3), 0, np.float64)
    y[::7, 1] = np.nan
    ours, whole = StandardScaler().fit(da.from_array(y, chunks=(9, 2))), StandardScaler().fit(y)
    np.testing.assert_allclose(ours.var_, whole.var_, rtol=1e-13)
    np.testing.assert_array_equal(ours.n_samples_seen_, whole.n_samples_seen_)


def test_blocks_without_rows_have_the_dtype_of_the_result():
    """Else the first one gives its own to what they are joined to, and numbers are cut to integers."""
    array = da.from_array(np.arange(12).reshape(6, 2), chunks=(3, 2))
    scaler = StandardScaler().fit(array)
    late = array[array[:, 0] > 6]
    z = scaler.transform(late).compute(scheduler="sync")
    np.testing.assert_array_equal(z, scaler.transform(late.compute(scheduler="sync")))
    assert z.dtype == np.float64


def test_the_scaler_of_frames_keeps_names_index_and_dtypes():
    pd = pytest.importorskip("pandas", reason="needs pandas: frames are its")
    dd = pytest.importorskip("dask.dataframe", reason="needs dask[dataframe]")
    frame = pd.DataFrame(
        {"a": np.float32([1, 2, 3, 4]), "b": [1.0, 5.0, 2.0, 0.0], "c": [1, 2, 3, 5]}, index=[5, 6, 7, 9]
    )
    lazy = dd.from_pandas(frame, npartitions=2)
    scaler = StandardScaler().fit(lazy)
    assert scaler.feature_names_in_.tolist() == ["a", "b", "c"]
    z = scaler.transform(lazy)
    assert list(z.columns) == ["a", "b", "c"]
    expected = StandardScaler().fit_transform(frame)
    computed = z.compute()
    np.testing.assert_allclose(computed, expected, rtol=1e-6)
    assert computed.index.tolist() == [5, 6, 7, 9]
    assert computed.dtypes.tolist() == z.dtypes.tolist() == [np.float32, np.float64, np.float64]
    np.testing.assert_allclose(scaler.inverse_transform(z).compute(), frame, rtol=1e-6)
    with pytest.raises(ValueError, match="feature names"):
        scaler.transform(lazy.rename(columns={"a": "x"}))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dtype", [
    "bool", "int8", "Int64", "Int8", "UInt8", "Float64", "Float32", "boolean", "Sparse[float]", "int64[pyarrow]",
    "float[pyarrow]", "bool[pyarrow]",
])  # fmt: skip
@pytest.mark.parametrize("beside", ["float32", "Float64", None])
def test_frames_of_mixed_dtypes_and_of_pandas_own(beside, dtype, missing):
    pd = pytest.importorskip("pandas", reason="needs pandas: frames are its")
    dd = pytest.importorskip("dask.dataframe", reason="needs dask[dataframe]")
    if "pyarrow" in dtype:
        pytest.importorskip("pyarrow", reason="needs pyarrow: the columns are its")
    none = missing and dtype not in ("bool", "int8")
    values = [1, 0, None if none else 1, 0, 1, 1, 0]
    frame = pd.DataFrame({"a": pd.Series(values, dtype=float).astype(dtype)})
    if beside is not None:
        frame["b"] = pd.Series([3.5, 1, 2, 7, 7, 0, 1]).astype(beside)
    lazy = dd.from_pandas(frame, npartitions=3)
    ours, whole = StandardScaler().fit(lazy), StandardScaler().fit(frame)
    np.testing.assert_allclose(ours.mean_, whole.mean_, rtol=1e-14)
    np.testing.assert_array_equal(ours.n_samples_seen_, whole.n_samples_seen_)
    z = ours.transform(lazy)
    computed = z.compute(scheduler="sync")
    assert [kind.kind for kind in computed.dtypes] == ["f"] * len(frame.columns)
    assert computed.dtypes.tolist() == z.dtypes.tolist()
    np.testing.assert_allclose(computed, whole.transform(frame), rtol=1e-6)
    with pytest.raises(TypeError, match="in column 'a'"):
        ours.transform(lazy.assign(a=lazy["a"].astype(str)))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_types(name):
    dtype = np.dtype("float16")
    if name == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16").bfloat16
    x = data((500, 3), 3).astype(dtype)
    array = da.from_array(x, chunks=100)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(bnfast.dask.moments(array).compute(scheduler="sync").var(), wide.var(0), rtol=1e-12)
    ours, whole = StandardScaler().fit(array), StandardScaler().fit(x)
    np.testing.assert_allclose(ours.var_, whole.var_, rtol=1e-12)
    z = ours.transform(array)
    computed = z.compute(scheduler="sync")
    assert z.dtype == computed.dtype == ours.inverse_transform(z).compute(scheduler="sync").dtype == dtype
    np.testing.assert_allclose(computed.astype(float), whole.transform(x).astype(float), rtol=1e-2)


def test_what_the_scaler_does_not_take():
    array = da.from_array(data((10, 3)), chunks=4)
    with pytest.raises(TypeError, match="sample_weight"):
        StandardScaler().fit(array, sample_weight=np.ones(10))
    with pytest.raises(ValueError, match="features"):
        StandardScaler().fit(array).transform(array[:, :2])
    with pytest.raises(TypeError, match="out"):
        StandardScaler().fit(array).transform(array, out=np.empty((10, 3), np.float32))


# --- on a cluster ---


def test_ten_times_a_workers_memory_go_through():
    """A LocalCluster of 2 workers with 300 MB each: 3 GB, made where they are reduced, and scaled there."""
    distributed = pytest.importorskip("distributed")
    with (
        dask.config.set({"distributed.worker.daemon": True}),
        distributed.LocalCluster(2, threads_per_worker=1, memory_limit="300MB", dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        array = da.random.default_rng(0).standard_normal(
            (7_500_000, 100), dtype=np.float32, chunks=(50_000, 100)
        ) + np.float32(3)
        m = client.compute(bnfast.dask.moments(array)).result(timeout=600)
        assert m.count == 7_500_000
        assert (abs(m.mean - 3) < 0.01).all()
        assert (abs(m.std() - 1) < 0.01).all()
        scaler = StandardScaler().fit(array[:500_000])
        assert abs(float(scaler.transform(array[:500_000]).mean().compute())) < 1e-3


def test_without_the_import_the_scaler_refuses_what_it_would_load_whole():
    run_script("""
import dask.array as da, bnfast
try:
    bnfast.StandardScaler().fit(da.ones((4, 2)))
except TypeError as error:
    assert "import bnfast.dask first" in str(error), error
else:
    raise AssertionError("taken")
""")
