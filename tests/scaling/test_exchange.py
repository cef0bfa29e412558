"""A scaler as scikit-learn's and back, and on from there: pipelines in ONNX, skops, joblib."""

import os

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import bnfast

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed: there is nothing to exchange with")
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

FITTED = ("mean_", "var_", "scale_", "n_samples_seen_", "n_features_in_")
OPTIONS = [{}, {"with_mean": False}, {"with_std": False}, {"with_mean": False, "with_std": False}, {"copy": False}]


def library(name):
    if os.environ.get("BNFAST_REQUIRE_FRAMEWORKS"):
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} is not installed")


def assert_same_state(one, other):
    assert one.get_params() == other.get_params()
    assert_array_equal(getattr(one, "feature_names_in_", None), getattr(other, "feature_names_in_", None))
    for name in FITTED:
        mine, its = getattr(one, name), getattr(other, name)
        assert (mine is None) == (its is None), name
        if mine is not None:
            assert_array_equal(mine, its, name)


@pytest.fixture
def x(rng):
    x = rng.normal(5, 3, (50, 4))
    x[:, 2] = 7  # constant
    return x


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("missing", [False, True])
def test_there_and_back(options, missing, x):
    if missing:
        x[0, 0] = np.nan
    ours = bnfast.StandardScaler(**options).fit(x)
    theirs = ours.to_sklearn()
    assert type(theirs) is StandardScaler
    assert_same_state(ours, theirs)
    np.testing.assert_allclose(theirs.transform(x.copy()), ours.transform(x.copy()), rtol=1e-12, atol=1e-12)
    back = bnfast.StandardScaler.from_sklearn(theirs)
    assert_same_state(ours, back)
    assert_array_equal(back.transform(x.copy()), ours.transform(x.copy()))
    # on from there, on both sides
    assert_array_equal(theirs.partial_fit(x).n_samples_seen_, back.partial_fit(x).n_samples_seen_)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_of_a_scaler_that_scikit_learn_fitted(options, x):
    theirs = StandardScaler(**options).fit(x)
    ours = bnfast.StandardScaler.from_sklearn(theirs)
    assert_same_state(ours, theirs)
    np.testing.assert_allclose(ours.transform(x.copy()), theirs.transform(x.copy()), rtol=1e-12, atol=1e-12)


def test_no_memory_is_shared_and_nothing_else_carried_over(x):
    ours = bnfast.StandardScaler().fit(x)
    theirs = ours.to_sklearn()
    assert not np.shares_memory(ours.mean_, theirs.mean_)
    theirs.mean_[0] = 0
    assert ours.mean_[0] != 0
    back = bnfast.StandardScaler.from_sklearn(theirs)
    theirs.scale_[0] = 9
    assert back.scale_[0] != 9


def test_unfitted_subclasses_names_and_what_is_none(x):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: names of features come with its frames")

    class Mine(bnfast.StandardScaler):
        pass

    unfitted = Mine.from_sklearn(StandardScaler(with_std=False))
    assert type(unfitted) is Mine
    assert not unfitted.with_std
    assert not hasattr(unfitted, "mean_")
    assert not hasattr(unfitted.to_sklearn(), "mean_")
    frame = pandas.DataFrame(x, columns=list("abcd"))
    named = bnfast.StandardScaler().fit(frame)
    assert_same_state(named, named.to_sklearn())
    assert_same_state(named, bnfast.StandardScaler.from_sklearn(named.to_sklearn()))
    with pytest.raises(TypeError, match=r"expected a sklearn.preprocessing.StandardScaler, got bnfast.StandardScaler"):
        bnfast.StandardScaler.from_sklearn(named)
    broken = StandardScaler().fit(x)
    broken.mean_ = broken.mean_[:2]
    with pytest.raises(bnfast.StateError, match="mean_"):
        bnfast.StandardScaler.from_sklearn(broken)


@pytest.mark.parametrize("method", ["fit", "fit_transform", "partial_fit", "transform", "inverse_transform"])
def test_methods_of_a_subclass_would_be_lost_and_are_refused(method, x):
    for base in (bnfast.StandardScaler, StandardScaler):
        mine = type("Mine", (base,), {method: lambda self, X, **others: self})()
        with pytest.raises(TypeError, match=f"Mine: expected the methods of StandardScaler, got another {method}"):
            mine.to_sklearn() if base is bnfast.StandardScaler else bnfast.StandardScaler.from_sklearn(mine)
    theirs = type("Mine", (StandardScaler,), {"more": lambda self: 1})().fit(x)
    assert_same_state(bnfast.StandardScaler.from_sklearn(theirs), theirs)


def test_the_container_that_was_chosen_stays_chosen(x):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: there are no frames to choose")
    ours = bnfast.StandardScaler().set_output(transform="pandas", inverse_transform="pandas").fit(x)
    theirs = ours.to_sklearn()
    back = bnfast.StandardScaler.from_sklearn(theirs)
    for scaler in (theirs, back):
        assert isinstance(scaler.transform(x), pandas.DataFrame)
        assert isinstance(scaler.inverse_transform(x), np.ndarray)
    plain = bnfast.StandardScaler().fit(x).to_sklearn()
    assert isinstance(plain.transform(x), np.ndarray)
    assert isinstance(bnfast.StandardScaler.from_sklearn(plain).transform(x), np.ndarray)


@pytest.fixture
def pipeline(x):
    target = x[:, 0] > x[:, 1]
    return make_pipeline(bnfast.StandardScaler(), LogisticRegression()).fit(x, target)


def as_sklearns(pipeline):
    """The pipeline with scikit-learn's scaler in the place of ours."""
    return make_pipeline(pipeline[0].to_sklearn(), *pipeline[1:])


def test_a_pipeline_goes_to_onnx(pipeline, x):
    convert = library("skl2onnx").to_onnx
    runtime = library("onnxruntime")
    model = convert(as_sklearns(pipeline), x[:1].astype(np.float32), options={"zipmap": False})
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels, probabilities = session.run(None, {session.get_inputs()[0].name: x.astype(np.float32)})
    assert_array_equal(labels, pipeline.predict(x))
    np.testing.assert_allclose(probabilities, pipeline.predict_proba(x), atol=1e-5)  # float32


def test_a_pipeline_goes_to_skops(pipeline, x):
    library("skops")
    from skops import io

    data = io.dumps(as_sklearns(pipeline))
    assert io.get_untrusted_types(data=data) == []  # nothing that a loader would have to be told to trust
    assert_array_equal(io.loads(data).predict_proba(x), as_sklearns(pipeline).predict_proba(x))


def test_a_pipeline_goes_to_joblib(pipeline, x, tmp_path):
    joblib = library("joblib")
    for number, model in enumerate((pipeline, as_sklearns(pipeline))):
        joblib.dump(model, tmp_path / f"{number}.joblib")
        assert_array_equal(joblib.load(tmp_path / f"{number}.joblib").predict_proba(x), model.predict_proba(x))
