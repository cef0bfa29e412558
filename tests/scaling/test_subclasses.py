"""Subclasses of StandardScaler: where scikit-learn's calls what they override, ours does."""

import numpy as np
import pytest

import bnfast
from bnfast import StandardScaler


class InLogs(StandardScaler):
    def fit(self, X, y=None, sample_weight=None):
        return super().fit(np.log(X), y, sample_weight)

    def transform(self, X, copy=None):
        return super().transform(np.log(X), copy)

    def inverse_transform(self, X, copy=None):
        return np.exp(super().inverse_transform(X, copy))


class InLogsByParts(StandardScaler):
    """Overrides what scikit-learn's fit calls, and with the fewest arguments."""

    def partial_fit(self, X, y=None, sample_weight=None):
        return super().partial_fit(np.log(X), y, sample_weight)

    def transform(self, X):
        return super().transform(np.log(X))


class Clipped(StandardScaler):
    """With a parameter of its own, and a name for what scikit-learn does not know."""

    def __init__(self, *, limit=1.0, copy=True, with_mean=True, with_std=True):
        super().__init__(copy=copy, with_mean=with_mean, with_std=with_std)
        self.limit = limit

    def fit(self, X, y=None, sample_weight=None, quantile=None):
        self.quantile_ = quantile
        return super().fit(X, y, sample_weight)

    def transform(self, X, copy=None):
        return np.clip(super().transform(X, copy), -self.limit, self.limit)


X = np.array([[1.0], [10.0], [100.0]])
EXPECTED = [-np.sqrt(1.5), 0.0, np.sqrt(1.5)]


@pytest.mark.parametrize("scaler", [InLogs, InLogsByParts])
def test_logarithms_in_every_method(scaler):
    once, apart = scaler(), scaler()
    for z in (once.fit_transform(X), apart.fit(X).transform(X)):
        np.testing.assert_allclose(z.ravel(), EXPECTED, atol=1e-15)
    for fitted in (once, apart):
        np.testing.assert_allclose(fitted.mean_, np.log(10), rtol=1e-15)
        assert fitted.n_samples_seen_ == 3
        assert fitted.fit(X[:2]).n_samples_seen_ == 2  # fit forgets
    assert scaler().fit_transform(X, sample_weight=[1, 0, 1])[1] == pytest.approx(0)


def test_parts_and_what_comes_back():
    scaler = InLogsByParts().partial_fit(X[:1]).partial_fit(X[1:])
    np.testing.assert_allclose(scaler.transform(X).ravel(), EXPECTED, atol=1e-15)
    logs = InLogs().fit(X)
    np.testing.assert_allclose(logs.inverse_transform(logs.transform(X)), X)
    np.testing.assert_allclose(logs.transform(X, copy=False).ravel(), EXPECTED, atol=1e-15)


def test_an_own_parameter_and_an_own_argument_of_fit():
    scaler = Clipped(limit=0.5)
    z = scaler.fit_transform(X, quantile=0.9)
    assert np.abs(z).max() == 0.5
    assert scaler.quantile_ == 0.9
    assert scaler.get_params()["limit"] == 0.5
    assert scaler.set_params(limit=2.0).limit == 2.0
    with pytest.raises(TypeError, match="unexpected keyword argument 'quantile'"):
        StandardScaler().fit_transform(X, quantile=0.9)


@pytest.mark.parametrize("method", ["fit", "partial_fit", "transform"])
def test_a_method_put_in_the_place_of_an_instances(method):
    scaler, calls = StandardScaler(), []
    original = getattr(scaler, method)
    setattr(scaler, method, lambda *args, **kwargs: calls.append(method) or original(*args, **kwargs))
    scaler.fit_transform(X)
    assert calls == [method]


@pytest.mark.parametrize("method", ["fit", "partial_fit", "fit_transform"])
def test_an_exception_in_a_subclass_leaves_it_as_it_was(method):
    class Failing(InLogsByParts):
        def transform(self, X):
            raise MemoryError

        def partial_fit(self, X, y=None, sample_weight=None):
            super().partial_fit(X, y, sample_weight)
            if len(X) < 3:
                raise MemoryError
            return self

    scaler = Failing().fit(X)
    before = dict(vars(scaler))
    with pytest.raises(MemoryError):
        getattr(scaler, method)(X if method == "fit_transform" else X[:2])
    if method == "partial_fit":  # the subclass's own: it has taken the data
        assert scaler.n_samples_seen_ == 5
    else:
        assert vars(scaler) == before


def test_parameters_that_are_estimators():
    class Around(StandardScaler):
        def __init__(self, inner=None):
            super().__init__()
            self.inner = inner

    scaler = Around(Clipped())
    assert scaler.get_params()["inner__limit"] == 1.0
    assert "inner__limit" not in scaler.get_params(deep=False)
    scaler.set_params(inner__limit=3.0)
    assert scaler.inner.limit == 3.0
    with pytest.raises(ValueError, match="Invalid parameter 'outer'"):
        scaler.set_params(outer__limit=3.0)

    class Variadic(StandardScaler):
        def __init__(self, *args):
            super().__init__()

    with pytest.raises(RuntimeError, match=r"got \*args"):
        Variadic().get_params()


# --- with scikit-learn ------------------------------------------------------------------------------------------


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.parametrize("scaler", [InLogs, InLogsByParts, Clipped])
def test_in_a_pipeline_training_and_prediction_see_the_same(sklearn, scaler):
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline

    x = np.exp(np.random.default_rng(0).normal(size=(50, 3)))
    y = np.log(x) @ [1.0, 2.0, 3.0]
    seen = []

    class Regression(LinearRegression):
        def fit(self, X, y):
            seen.append(X)
            return super().fit(X, y)

        def predict(self, X):
            seen.append(X)
            return super().predict(X)

    pipeline = make_pipeline(scaler(), Regression()).fit(x, y)
    predicted = pipeline.predict(x)
    np.testing.assert_array_equal(*seen)
    if scaler is not Clipped:
        np.testing.assert_allclose(predicted, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("overridden", ["InLogs", "InLogsByParts", "Clipped"])
def test_the_same_as_that_subclass_of_scikit_learns(sklearn, overridden):
    """The same source, with their class in the place of ours."""
    import inspect

    from sklearn.preprocessing import StandardScaler as Theirs

    ours, names = globals()[overridden], {"np": np, "StandardScaler": Theirs}
    exec(inspect.getsource(ours), names)
    theirs = names[overridden]
    x = np.exp(np.random.default_rng(0).normal(size=(50, 3)))
    a, b = ours(), theirs()
    np.testing.assert_allclose(a.fit_transform(x), b.fit_transform(x), rtol=1e-12, atol=1e-12)
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12)
    np.testing.assert_allclose(a.transform(x[:7]), b.transform(x[:7]), rtol=1e-12, atol=1e-12)
    assert a.get_params() == b.get_params()


def test_what_it_transforms_comes_in_a_frame_where_one_is_asked_for(sklearn):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(X, columns=["a"], index=[3, 4, 5])
    for scaler in (InLogs(), Clipped()):
        scaler.set_output(transform="pandas")
        for found in (scaler.fit_transform(frame), scaler.fit(frame).transform(frame)):
            assert found.columns.tolist() == ["a"]
            assert found.index.tolist() == [3, 4, 5]

    class Plain(InLogs, auto_wrap_output_keys=None):
        pass

    assert type(Plain().set_output(transform="pandas").fit(X).transform(X)) is np.ndarray
    assert bnfast.StandardScaler().fit(X).transform(X, out=X.copy()).shape == X.shape


def test_what_a_subclasss_methods_take_is_routed(sklearn):
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    with sklearn.config_context(enable_metadata_routing=True):
        scaler = Clipped().set_fit_request(quantile=True, sample_weight=True)
        pipeline = make_pipeline(scaler, Ridge().set_fit_request(sample_weight=False))
        pipeline.fit(X, [1.0, 2.0, 3.0], quantile=0.9, sample_weight=[1.0, 1.0, 0.0])
        assert pipeline[0].quantile_ == 0.9
        assert pipeline[0].n_samples_seen_ == 2
        assert InLogsByParts().get_metadata_routing().transform.requests == {}  # it takes no copy
        with pytest.raises(TypeError, match=r"Unexpected args: \['copy'\] in set_transform_request"):
            InLogsByParts().set_transform_request(copy=True)
        with pytest.raises(
            TypeError, match=r"Unexpected args: \['quantile'\] in set_fit_request. Accepted arguments are"
        ):
            StandardScaler().set_fit_request(quantile=True)
