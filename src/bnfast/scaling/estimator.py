"""What scikit-learn expects of a transformer, without scikit-learn.

Inheriting from its classes would make it a requirement, and import it, which takes a second. So the protocol is
written out here. scikit-learn is imported by the methods that it alone calls, and asked for its configuration where it
is loaded already.
"""

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Transformer", "feature_names", "wrapping"]

Names = NDArray[np.object_]

# What a meta-estimator may route: the arguments of these methods, but for data and for ours; and the default of
# set_*_request: unchanged.
ROUTED = ("fit", "partial_fit", "transform", "inverse_transform")
NOT_ROUTED = {"X", "y", "out", "batch_size", "progress"}
UNCHANGED = "$UNCHANGED$"


class NotFittedError(ValueError, AttributeError):
    """As `sklearn.exceptions.NotFittedError`, which is raised instead where scikit-learn is loaded."""


class Transformer:
    """Parameters, tags, names of features, output containers, metadata routing; a feature out for a feature in."""

    n_features_in_: int
    feature_names_in_: Names
    _sklearn_auto_wrap_output_keys = frozenset({"transform"})

    # --- parameters ---

    @classmethod
    def _get_param_names(cls) -> list[str]:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            raise RuntimeError(f"{cls.__name__}: expected the parameters of __init__ by name, got *args")
        return sorted(parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters of the constructor.

        Parameters
        ----------
        deep : bool
            Whether those of parameters that are estimators (a subclass may have some) are there, as `name__theirs`.

        Returns
        -------
        dict
            {name: value}
        """
        found = {name: getattr(self, name) for name in self._get_param_names()}
        for name, value in list(found.items()) if deep else ():
            if hasattr(value, "get_params") and not isinstance(value, type):
                found |= {f"{name}__{theirs}": it for theirs, it in value.get_params().items()}
        return found

    def set_params(self, **params: Any) -> Self:
        """Set parameters of the constructor: all of them or, if one is unknown, none.

        Parameters
        ----------
        **params : dict
            {name: value}

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If there is no such parameter.
        """
        known = self._get_param_names()
        nested: dict[str, dict[str, Any]] = {}
        own = {}
        for given, value in params.items():
            name, of_another, theirs = given.partition("__")
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r} for estimator {self}. Valid parameters are: {known!r}.")
            if of_another:
                nested.setdefault(name, {})[theirs] = value
            else:
                own[name] = value
        for name, theirs_of in nested.items():
            (own.get(name) or getattr(self, name)).set_params(**theirs_of)
        vars(self).update(own)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        changed = {
            name: value for name, value in self.get_params(deep=False).items() if value is not defaults[name].default
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def _repr_html_(self) -> str | None:
        """scikit-learn's diagram where it is loaded; a notebook takes None for none."""
        if "sklearn.utils" not in sys.modules:
            return None
        from sklearn.utils import estimator_html_repr

        return str(estimator_html_repr(self))

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(allow_nan=True, sparse=not getattr(self, "with_mean", True)),
        )

    def _more_tags(self) -> dict[str, Any]:
        """The same for scikit-learn before 1.6."""
        return {"allow_nan": True, "preserves_dtype": [np.float64, np.float32]}

    # --- features ---

    def _check_is_fitted(self) -> None:
        if "n_features_in_" not in vars(self):
            loaded = sys.modules.get("sklearn.exceptions")
            error: type[Exception] = NotFittedError if loaded is None else loaded.NotFittedError
            raise error(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with appropriate arguments before "
                "using this estimator."
            )

    def _check_n_features(self, x: NDArray[Any]) -> None:
        if x.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {x.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input."
            )

    def _check_feature_names(self, names: Names | None) -> None:
        """Names of what comes after fit: different ones are an error, names on one side alone a warning."""
        fitted = getattr(self, "feature_names_in_", None)
        who = type(self).__name__
        if names is None and fitted is None:
            return
        if fitted is None:
            warnings.warn(f"X has feature names, but {who} was fitted without feature names", stacklevel=3)
        elif names is None:
            warnings.warn(f"X does not have valid feature names, but {who} was fitted with feature names", stacklevel=3)
        elif not np.array_equal(names, fitted):
            raise ValueError(_difference(list(fitted), list(names)))

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> Names:
        """Names of the features of the output: those of the input.

        Parameters
        ----------
        input_features : array_like of str, optional
            Names to use if the scaler was fitted to data without; else they must be those of the data.

        Returns
        -------
        ndarray of str objects
            `feature_names_in_`, or x0, x1, ... if there are no names.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before fit (without scikit-learn: an error that is a ValueError and an AttributeError, too).
        ValueError
            If `input_features` do not fit.
        """
        self._check_is_fitted()
        fitted = getattr(self, "feature_names_in_", None)
        if input_features is None:
            return np.array([f"x{i}" for i in range(self.n_features_in_)], object) if fitted is None else fitted
        names = np.asarray(input_features, dtype=object)
        if fitted is not None and not np.array_equal(fitted, names):
            raise ValueError("input_features is not equal to feature_names_in_")
        if len(names) != self.n_features_in_:
            raise ValueError(
                f"input_features should have length equal to number of features ({self.n_features_in_}), "
                f"got {len(names)}"
            )
        return names

    # --- output containers ---

    def set_output(self, *, transform: str | None = None, inverse_transform: str | None = None) -> Self:
        """Choose what `transform` and `fit_transform`, and what `inverse_transform` return. Needs scikit-learn.

        Parameters
        ----------
        transform : {"default", "pandas", "polars"}, optional
            None changes nothing.
        inverse_transform : {"default", "pandas", "polars"}, optional
            As `transform`; where it is not set `inverse_transform` returns arrays, as scikit-learn's does always.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            If scikit-learn is not installed.
        """
        import sklearn.utils._set_output  # noqa: F401  (better now than in transform)

        asked = {"transform": transform, "inverse_transform": inverse_transform}
        if asked := {method: container for method, container in asked.items() if container is not None}:
            self._sklearn_output_config = {**vars(self).get("_sklearn_output_config", {}), **asked}
        return self

    def _wrapped(self, result: Any, original: object, method: str = "transform") -> Any:
        """The result in the container that `set_output` or scikit-learn's configuration asks for."""
        chosen = vars(self).get("_sklearn_output_config")
        if chosen is None and "sklearn.utils._set_output" not in sys.modules:
            return result
        if method == "inverse_transform" and method not in (chosen or ()):
            return result
        from sklearn.utils._set_output import _wrap_data_with_container

        return _wrap_data_with_container(method, result, original, self)

    # --- callbacks ---

    def set_callbacks(self, *callbacks: Any) -> Self:
        """Choose what is told of the beginning and the end of a fit. Needs scikit-learn 1.9 or newer.

        Parameters
        ----------
        *callbacks : objects with scikit-learn's protocol of callbacks
            In the place of those before; none takes them away.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            If scikit-learn is not installed, or is older.
        TypeError
            If one is no callback.
        """
        from sklearn.callback import CallbackSupportMixin

        CallbackSupportMixin.set_callbacks(self, *callbacks)
        return self

    def _has_callbacks(self) -> bool:
        """Whether somebody listens, or a meta-estimator wants to know where in its fit this one is."""
        state = vars(self)
        return "_skl_callbacks" in state or "_parent_callback_ctx" in state

    def _told_to_callbacks(self, work: Callable[[], object], x: object, y: object, sample_weight: object) -> None:
        """Does the work, a fit to x, and tells the callbacks as scikit-learn's scaler does: it is one task."""
        from sklearn.callback import CallbackSupportMixin, with_callbacks

        def fit(estimator: Transformer) -> None:
            context = CallbackSupportMixin._init_callback_context(estimator)
            task = {"estimator": estimator, "X": x, "y": y, "metadata": {"sample_weight": sample_weight}}
            context.call_on_fit_task_begin(**task)
            work()
            context.call_on_fit_task_end(**task, reconstruction_attributes={})

        with_callbacks(fit)(self)

    # --- subclasses ---

    def _overrides(self, base: type, *methods: str) -> bool:
        """Whether one of the methods is not that of the base: a subclass's, or one put in its place."""
        own = vars(base)
        return any(getattr(getattr(self, name), "__func__", None) is not own[name] for name in methods)

    @contextlib.contextmanager
    def _unchanged_by_errors(self) -> Iterator[None]:
        """Gives the attributes that were, should anything be raised."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            self.__dict__ = before
            raise

    # --- metadata routing ---

    def get_metadata_routing(self) -> Any:
        """What metadata the methods ask a meta-estimator for. Needs scikit-learn.

        Returns
        -------
        sklearn.utils.metadata_routing.MetadataRequest
        """
        from sklearn.utils.metadata_routing import MetadataRequest, get_routing_for_object

        if hasattr(self, "_metadata_request"):
            return get_routing_for_object(self._metadata_request)
        request = MetadataRequest(owner=self)
        for method in ROUTED:
            for name in self._routed(method):
                getattr(request, method).add_request(param=name, alias=None)
        return request

    def _routed(self, method: str) -> list[str]:
        """The arguments of a method, perhaps a subclass's, that may be routed."""
        parameters = inspect.signature(getattr(type(self), method)).parameters.values()
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return [name for name in named[1:] if name not in NOT_ROUTED]

    def set_fit_request(self, *, sample_weight: bool | str | None = UNCHANGED, **others: bool | str | None) -> Self:
        """Say whether meta-estimators shall pass `sample_weight` to `fit`. Needs scikit-learn's metadata routing.

        Parameters
        ----------
        sample_weight : bool, None or str
            True: pass it; False: do not; None: an error if it is given; a str: pass what has this name.
        **others : bool, None or str
            The same for what a subclass's `fit` takes besides.

        Returns
        -------
        self
        """
        return self._request("fit", sample_weight=sample_weight, **others)

    def set_partial_fit_request(
        self, *, sample_weight: bool | str | None = UNCHANGED, **others: bool | str | None
    ) -> Self:
        """As `set_fit_request`, for `partial_fit`.

        Parameters
        ----------
        sample_weight : bool, None or str
        **others : bool, None or str

        Returns
        -------
        self
        """
        return self._request("partial_fit", sample_weight=sample_weight, **others)

    def set_transform_request(self, *, copy: bool | str | None = UNCHANGED, **others: bool | str | None) -> Self:
        """As `set_fit_request`, for `transform` and its `copy`.

        Parameters
        ----------
        copy : bool, None or str
        **others : bool, None or str

        Returns
        -------
        self
        """
        return self._request("transform", copy=copy, **others)

    def set_inverse_transform_request(
        self, *, copy: bool | str | None = UNCHANGED, **others: bool | str | None
    ) -> Self:
        """As `set_fit_request`, for `inverse_transform` and its `copy`.

        Parameters
        ----------
        copy : bool, None or str
        **others : bool, None or str

        Returns
        -------
        self
        """
        return self._request("inverse_transform", copy=copy, **others)

    def _request(self, method: str, **aliases: bool | str | None) -> Self:
        from sklearn import get_config

        if not get_config().get("enable_metadata_routing", False):
            raise RuntimeError(
                "This method is only available when metadata routing is enabled. You can enable it using "
                "sklearn.set_config(enable_metadata_routing=True)."
            )
        asked = {name: alias for name, alias in aliases.items() if alias != UNCHANGED}
        if unknown := sorted(asked.keys() - set(self._routed(method))):
            raise TypeError(
                f"Unexpected args: {unknown} in set_{method}_request. Accepted arguments are: {self._routed(method)}"
            )
        request = self.get_metadata_routing()
        for name, alias in asked.items():
            getattr(request, method).add_request(param=name, alias=alias)
        self._metadata_request = request
        return self


def wrapping(method: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's `transform` or `fit_transform`, whose result comes in the container that is asked for."""

    @functools.wraps(method)
    def wrapped(self: Transformer, X: object, *args: Any, **kwargs: Any) -> Any:
        result = method(self, X, *args, **kwargs)
        return result if kwargs.get("out") is not None else self._wrapped(result, X)

    return wrapped


def feature_names(x: object) -> Names | None:
    """The column names of a data frame (pandas, polars, ...) if all are str, else None; TypeError if some are."""
    if isinstance(x, (np.ndarray, list, tuple)):
        return None
    columns = getattr(x, "column_names", None)  # pyarrow
    if columns is None:
        columns = getattr(x, "columns", None)
    if columns is None or callable(columns):
        return None
    names = np.array(list(columns), dtype=object)
    kinds = sorted({type(name).__qualname__ for name in names})
    if kinds == ["str"]:
        return names
    if "str" in kinds:
        raise TypeError(
            "Feature names are only supported if all input features have string names, but your input has "
            f"{kinds} as feature name / column name types. Use X.columns = X.columns.astype(str), or names that are "
            "no strings."
        )
    return None


def _difference(fitted: list[str], names: list[str]) -> str:
    """How two lists of names differ, in scikit-learn's words."""

    def listed(found: set[str]) -> str:
        return "".join(f"- {name}\n" for name in sorted(found)[:5]) + ("- ...\n" if len(found) > 5 else "")

    unseen, missing = set(names) - set(fitted), set(fitted) - set(names)
    message = "The feature names should match those that were passed during fit.\n"
    if unseen:
        message += f"Feature names unseen at fit time:\n{listed(unseen)}"
    if missing:
        message += f"Feature names seen at fit time, yet now missing:\n{listed(missing)}"
    if not unseen and not missing:
        message += "Feature names must be in the same order as they were in fit.\n"
    return message
