"""Feature scaling: scikit-learn's StandardScaler, faster, more accurate, and mergeable."""

import copy as copying
import functools
import os
import threading
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from .._checks import flag
from ..state.files import StateError
from .affine import mapped, mapped_columns, mapped_in_batches
from .batches import batches_of, checked_batch_size
from .columns import merged, statistics
from .data import Array, Float64, as_table, as_weights, is_sparse
from .estimator import Transformer, feature_names, wrapping
from .exchange import output_of, state_of, to_sklearn
from .fitted import FITTED, attributes, check_fitted, given, is_fitted, statistics_of
from .lazy import is_lazy, known
from .peer import fitted_to_sparse, scaled_sparse

__all__ = ["StandardScaler"]

PARAMETERS = ("copy", "with_mean", "with_std")

# Held while what was found becomes a scaler's state: a moment, so one for all is enough. A child of fork has its own.
_committing = threading.RLock()


def _renew_lock() -> None:
    global _committing
    _committing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class StandardScaler(Transformer):
    """Scale each feature to mean 0 and standard deviation 1: z = (x - mean) / std.

    Constructor, methods, attributes and results are those of `sklearn.preprocessing.StandardScaler`, for subclasses,
    too; scikit-learn is not needed, and where it is installed the scaler works in its pipelines and searches. Beyond
    it: scalers of parts of the data merge, float32 data keep their digits when the mean is far from zero, `out=`, and
    data larger than memory.

    Parameters
    ----------
    copy : bool
        False: `transform` and `inverse_transform` write into X itself, if it is a writeable array of floats.
    with_mean : bool
        Subtract the mean.
    with_std : bool
        Divide by the standard deviation.

    Attributes
    ----------
    mean_ : (n_features,) float64 ndarray or None
        None if neither `with_mean` nor `with_std`.
    var_ : (n_features,) float64 ndarray or None
        The population's variance (divisor: number of samples); None unless `with_std`.
    scale_ : (n_features,) float64 ndarray or None
        The standard deviation, 1 for features that are constant to rounding (see the notes); None unless `with_std`.
    n_samples_seen_ : int, or (n_features,) ndarray
        Samples that are not NaN, an array if the features differ in it; with `sample_weight` the sum of the weights.
    n_features_in_ : int
    feature_names_in_ : (n_features,) ndarray of str objects
        Only after a fit to a data frame whose column names are all str.

    Raises
    ------
    TypeError
        In `fit`, if a parameter is not a bool.

    Notes
    -----
    NaN are missing values: ignored in fit, kept in transform. Infinities are refused. Sparse data (of SciPy) with
    `with_mean=False` are given to scikit-learn's scaler, where it is installed: results and attributes are its own.

    A feature is constant if its standard deviation is at most n * eps * abs(mean), with eps = 2.2e-16 and n the number
    of samples, 10,000 at most: scikit-learn's rule up to there. A sum of weights counts as 10,000, whatever their unit.

    What is read in place: arrays of float32 or float64 whose memory is dense, in rows or in columns. Of views with gaps
    or turned round, and of other dtypes, a chunk of 1 MiB is copied at a time; objects, strings and data frames whose
    columns lie apart become one array first. Data with `sample_weight` or NaN are converted to float64 in chunks.

    Calls of `partial_fit` from several threads take effect one after another, each as a whole, in any order.

    An exception in any method leaves the scaler as it was; an array that is written to (`out`, or X with `copy=False`)
    may then be partly written, unless the data or arguments are at fault.

    Where scikit-learn's results are accidents this class differs: a feature of which all values were NaN recovers in a
    later `partial_fit`; sums of weights are not truncated by a later one without weights; with neither `with_mean` nor
    `with_std` weights count in `n_samples_seen_`, too.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[0.0, 10.0], [0.0, 10.0], [1.0, 30.0], [1.0, 30.0]])
    >>> scaler = bnfast.StandardScaler().fit(x)
    >>> scaler.mean_, scaler.scale_
    (array([ 0.5, 20. ]), array([ 0.5, 10. ]))
    >>> scaler.transform([[2.0, 20.0]])
    array([[3., 0.]])
    """

    copy: bool
    with_mean: bool
    with_std: bool
    mean_: Float64 | None
    var_: Float64 | None
    scale_: Float64 | None
    n_samples_seen_: Any
    __module__ = "bnfast"  # where it is found, also by pickles

    def __init__(self, *, copy: bool = True, with_mean: bool = True, with_std: bool = True) -> None:
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std

    # --- fit ---

    def fit(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Self:
        """Take mean and standard deviation from X, and forget those of earlier fits.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of numbers
            float32 and float64 are read in place, once; other dtypes become float64, a chunk at a
            time. May be a memmap larger than memory, or sparse (see the notes).
        y : object
            Ignored.
        sample_weight : (n_samples,) array_like or float, optional
            Weights of the samples.
        batch_size : int, optional
            Rows to take at a time; None: all at once.
        progress : bool
            Report on the standard error stream, batch by batch (of 32 MiB if there is no `batch_size`).

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If X is masked, not two-dimensional, empty, complex, contains an infinity, dates or no numbers, is sparse
            and `with_mean` true; if `sample_weight` does not fit it, is negative, not finite or all zero; if
            `batch_size` is no int of at least 1; if a variance is beyond float64's range, or so small (below 1e-290)
            that it has lost digits, of a feature that is not constant.

        Examples
        --------
        >>> import bnfast
        >>> bnfast.StandardScaler().fit([[1], [2], [6]], batch_size=2).mean_
        array([3.])
        """
        if self._overrides(StandardScaler, "partial_fit"):
            options: dict[str, Any] = {
                name: it for name, it in (("batch_size", batch_size), ("progress", progress)) if it
            }
            with self._unchanged_by_errors():
                self._replace_fitted({})
                self.partial_fit(X, y, sample_weight, **options)
            return self
        return self._fit(X, y, sample_weight, batch_size, progress, again=True)

    def partial_fit(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Self:
        """Add X to the data that the scaler has been fitted to.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of numbers
        y : object
            Ignored.
        sample_weight : (n_samples,) array_like or float, optional
            Weights of the samples.
        batch_size : int, optional
            Rows to take at a time; None: all at once.
        progress : bool
            Report on the standard error stream.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            As `fit`; also if X has other features than the data before.

        Notes
        -----
        Chan, Golub and LeVeque (1979), as `Moments`.

        Examples
        --------
        >>> import bnfast
        >>> scaler = bnfast.StandardScaler()
        >>> for part in ([[1.0], [2.0]], [[6.0]]):
        ...     _ = scaler.partial_fit(part)
        >>> scaler.mean_, scaler.n_samples_seen_
        (array([3.]), np.int64(3))
        """
        return self._fit(X, y, sample_weight, batch_size, progress, again=False)

    def _fit(
        self,
        x: object,
        y: object,
        sample_weight: ArrayLike | None,
        batch_size: int | None,
        progress: bool,
        *,
        again: bool,
    ) -> Self:
        """`fit` if `again`, else `partial_fit`; tells the callbacks."""
        take = self._take_lazy if is_lazy(x) else self._take_sparse if is_sparse(x) else self._take
        if not self._has_callbacks():
            take(x, sample_weight, batch_size, progress, again)
            return self
        work = functools.partial(take, x, sample_weight, batch_size, progress, again)
        with self._unchanged_by_errors():
            self._told_to_callbacks(work, x, y, sample_weight)
        return self

    def _take(
        self,
        x: object,
        sample_weight: ArrayLike | None,
        batch_size: int | None,
        progress: bool,
        again: bool,
    ) -> None:
        """The statistics of x become those of the scaler, or join them."""
        wanted, batch_size = self._wanted(), checked_batch_size(batch_size)
        names = feature_names(x)
        if before := not again and is_fitted(vars(self)):
            self._check_feature_names(names)
        data = as_table(x)
        if before:
            self._check_n_features(data)
        weights = None if sample_weight is None else as_weights(sample_weight, len(data))
        parts = [
            statistics(data[rows], None if weights is None else weights[rows])
            for rows in batches_of(data, batch_size, progress)
        ]
        self._join(data, parts, names, again, wanted)

    def _take_lazy(
        self, x: Any, sample_weight: ArrayLike | None, batch_size: int | None, progress: bool, again: bool
    ) -> None:
        """`_take` of data that are not here yet: computed once."""
        kind, wanted = known(x), self._wanted()
        for name, it in (("sample_weight", sample_weight), ("batch_size", batch_size)):
            if it is not None:
                raise TypeError(f"{name}: expected None for {type(x).__name__}, got {type(it).__name__}")
        names = feature_names(x)
        if not again and is_fitted(vars(self)):
            self._check_feature_names(names)
            self._check_n_features(x)
        found = kind.statistics(x)
        if not np.all(np.asarray(found.count) >= 0) or np.max(found.count, initial=0) == 0:
            raise ValueError("X: expected at least one sample, got none")
        self._join(x, [found], names, again, wanted)

    def _join(self, data: Any, parts: list[Any], names: Any, again: bool, wanted: dict[str, bool]) -> None:
        """Statistics of parts of the data become those of the scaler, or join them."""
        with _committing:
            state = vars(self)
            if not again and is_fitted(state):  # perhaps since a moment ago, by another thread
                self._check_n_features(data)
                parts.insert(0, statistics_of(state, **wanted))
                names = state.get("feature_names_in_")
            self._replace_fitted(attributes(functools.reduce(merged, parts), names, **wanted))

    def _take_sparse(
        self, x: Any, sample_weight: ArrayLike | None, batch_size: int | None, progress: bool, again: bool
    ) -> None:
        """`_take` of sparse data, which is scikit-learn's work."""
        self._wanted()
        self._check_sparse()
        batch_size = checked_batch_size(batch_size)
        weights = None if sample_weight is None else as_weights(sample_weight, x.shape[0])
        while True:
            state = vars(self)
            fitted = {} if again else _fitted_of(state)
            found = fitted_to_sparse(x, weights, self._parameters(), fitted, batch_size)
            with _committing:
                if again or vars(self) is state:  # else another thread was faster, whose data are missing here
                    self._replace_fitted(found)
                    return

    def _parameters(self) -> dict[str, bool]:
        return {name: getattr(self, name) for name in PARAMETERS}

    def _wanted(self) -> dict[str, bool]:
        """with_mean and with_std, once all parameters are checked."""
        for name, value in self._parameters().items():
            flag(value, name)
        return {"with_mean": self.with_mean, "with_std": self.with_std}

    def _check_sparse(self, what: str = "center") -> None:
        if self.with_mean:
            raise ValueError(
                f"Cannot {what} sparse matrices: pass `with_mean=False` instead. See docstring for motivation and "
                "alternatives."
            )

    def _replace_fitted(self, state: Mapping[str, Any]) -> None:
        """All that was fitted gives way to `state`, at once."""
        with _committing:
            self.__dict__ = {name: it for name, it in vars(self).items() if name not in FITTED} | dict(state)

    def set_params(self, **params: Any) -> Self:
        with _committing:
            return super().set_params(**params)

    set_params.__doc__ = Transformer.set_params.__doc__

    def __init_subclass__(cls, auto_wrap_output_keys: tuple[str, ...] | None = ("transform",), **kwargs: Any) -> None:
        """As scikit-learn's transformers: what a subclass transforms comes in the container that is asked for."""
        super().__init_subclass__(**kwargs)
        if auto_wrap_output_keys is None:
            cls._sklearn_auto_wrap_output_keys = frozenset()
        for name in {"transform", "fit_transform"} & vars(cls).keys() if auto_wrap_output_keys else ():
            setattr(cls, name, wrapping(vars(cls)[name]))

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        """Of a pickle or copy: refused with StateError where its parts do not fit each other."""
        try:
            state = dict(pickled)
            check_fitted(state)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise StateError(f"pickle: {error}") from error
        self.__dict__.update(state)

    # --- transform ---

    def transform(
        self,
        X: ArrayLike,
        copy: bool | None = None,
        *,
        out: Array | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Scale X with the statistics that the scaler has been fitted to.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of numbers
        copy : bool, optional
            Instead of the scaler's own.
        out : ndarray, optional
            Where to write, of X's shape and the result's dtype; may be X, or a memmap. It is returned, whatever
            `set_output` says.
        batch_size : int, optional
            Rows to take at a time; None: all at once.
        progress : bool
            Report on the standard error stream, batch by batch (of 32 MiB if there is no `batch_size`).

        Returns
        -------
        (n_samples, n_features) ndarray, or a data frame after `set_output`; sparse if X is
            float16, bfloat16, float32 or float64 as X is; float64 for other dtypes.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before fit (without scikit-learn: an error that is a ValueError and an AttributeError, too).
        TypeError, ValueError
            If X is not as in `fit`, or `out` does not fit.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> x = np.array([[1.0], [3.0]])
        >>> bnfast.StandardScaler().fit(x).transform(x, out=x)
        array([[-1.],
               [ 1.]])
        """
        self._check_is_fitted()
        state, copy = vars(self), self.copy if copy is None else copy
        if is_lazy(X):
            self._check_feature_names(feature_names(X))
            return self._mapped_lazily(X, out, self._forwards(state), self._forwards(state))
        if is_sparse(X):
            return self._wrapped(self._scaled_sparse("transform", X, copy, out), X)
        self._check_feature_names(feature_names(X))
        data = as_table(X)
        self._check_n_features(data)
        coefficients = self._forwards(state)
        if batch_size is None and not progress:
            result = mapped(data, *coefficients, copy, out, search=True)
        else:
            result = mapped_in_batches(data, *coefficients, copy, out, checked_batch_size(batch_size), progress)
        return result if out is not None else self._wrapped(result, X)

    def fit_transform(
        self,
        X: ArrayLike,
        y: object = None,
        *,
        sample_weight: ArrayLike | None = None,
        out: Array | None = None,
        **fit_params: Any,
    ) -> Any:
        """`fit`, then `transform` of the same data: those of a subclass where it has its own.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of numbers
        y : object
            Ignored.
        sample_weight : (n_samples,) array_like or float, optional
            Weights of the samples.
        out : ndarray, optional
            As in `transform`.
        **fit_params : dict
            Given on to a subclass's `fit`.

        Returns
        -------
        (n_samples, n_features) ndarray, or a data frame after `set_output`; sparse if X is

        Raises
        ------
        TypeError, ValueError
            As `fit` and `transform`.

        Examples
        --------
        >>> import bnfast
        >>> bnfast.StandardScaler().fit_transform([[1], [3]])
        array([[-1.],
               [ 1.]])
        """
        own = self._overrides(StandardScaler, "fit", "partial_fit", "transform")
        if is_lazy(X) or is_sparse(X) or self._has_callbacks() or own:
            if sample_weight is not None:
                fit_params["sample_weight"] = sample_weight
            if y is not None:
                fit_params["y"] = y
            given_out: dict[str, Any] = {} if out is None else {"out": out}
            with self._unchanged_by_errors():
                return self.fit(X, **fit_params).transform(X, **given_out)
        if fit_params:
            raise TypeError(f"fit_transform() got an unexpected keyword argument {next(iter(fit_params))!r}")
        wanted, names, data = self._wanted(), feature_names(X), as_table(X)
        weights = None if sample_weight is None else as_weights(sample_weight, len(data))
        fitted = copying.copy(self)
        fitted._replace_fitted(attributes(statistics(data, weights), names, **wanted))
        # what has been fitted has no infinity
        result = mapped(data, *fitted._forwards(vars(fitted)), self.copy, out, search=False)
        wrapped = result if out is not None else fitted._wrapped(result, X)
        self._replace_fitted(_fitted_of(vars(fitted)))
        return wrapped

    def inverse_transform(
        self,
        X: ArrayLike,
        copy: bool | None = None,
        *,
        out: Array | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Scale back: x = z * std + mean.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of numbers
            What `transform` gave.
        copy : bool, optional
            Instead of the scaler's own.
        out : ndarray, optional
            As in `transform`.
        batch_size : int, optional
            As in `transform`.
        progress : bool
            As in `transform`.

        Returns
        -------
        (n_samples, n_features) ndarray, or a data frame after `set_output(inverse_transform=...)`; sparse if X is

        Raises
        ------
        sklearn.exceptions.NotFittedError, TypeError, ValueError
            As `transform`.

        Examples
        --------
        >>> import bnfast
        >>> scaler = bnfast.StandardScaler().fit([[1.0], [3.0]])
        >>> scaler.inverse_transform([[-1.0], [2.0]])
        array([[1.],
               [4.]])
        """
        self._check_is_fitted()
        state, copy = vars(self), self.copy if copy is None else copy
        if is_lazy(X):
            narrow, wide = (self._backwards(state, np.dtype(dtype)) for dtype in (np.float32, np.float64))
            return self._mapped_lazily(X, out, narrow, wide)
        if is_sparse(X):
            return self._wrapped(self._scaled_sparse("inverse_transform", X, copy, out), X, "inverse_transform")
        data = as_table(X)
        self._check_n_features(data)
        coefficients = self._backwards(state, data.dtype)
        if batch_size is None and not progress:
            result = mapped(data, *coefficients, copy, out, search=True)
        else:
            result = mapped_in_batches(data, *coefficients, copy, out, checked_batch_size(batch_size), progress)
        return result if out is not None else self._wrapped(result, X, "inverse_transform")

    def _mapped_lazily(self, x: Any, out: Array | None, narrow: Any, wide: Any) -> Any:
        """A collection like x, not computed. narrow, wide: coefficients of float32 and of other data."""
        kind = known(x)
        if out is not None:
            raise TypeError(f"out: expected None for {type(x).__name__}, got {type(out).__name__}")
        self._check_n_features(x)
        return kind.mapped(x, functools.partial(mapped_columns, narrow, wide))

    def _forwards(self, state: Mapping[str, Any]) -> tuple[Float64, Float64, Float64 | None]:
        """center, scale and shift of `transform`: (x - center) * scale + shift."""
        n = state["n_features_in_"]
        center = given(state, "mean_") if self.with_mean else np.zeros(n)
        scale = 1.0 / given(state, "scale_") if self.with_std else np.ones(n)
        return center, scale, None if self.with_mean else np.full(n, -0.0)  # which leaves the sign of a zero

    def _backwards(self, state: Mapping[str, Any], dtype: np.dtype[Any]) -> tuple[Float64, Float64, Float64 | None]:
        """center, scale and shift of `inverse_transform` for data of this dtype."""
        n = state["n_features_in_"]
        scale = given(state, "scale_") if self.with_std else np.ones(n)
        if not self.with_mean:
            return np.zeros(n), scale, np.full(n, -0.0)
        # what is lost of the mean when it becomes float32 is added before the multiplication
        mean = given(state, "mean_")
        with np.errstate(over="ignore", invalid="ignore"):
            shift = mean.astype(np.float32).astype(np.float64) if dtype == np.float32 else mean
            return np.where(np.isfinite(shift), (shift - mean) / scale, 0.0), scale, shift

    def _scaled_sparse(self, method: str, x: Any, copy: bool, out: Array | None) -> Any:
        self._check_sparse("center" if method == "transform" else "uncenter")
        if out is not None:
            raise TypeError("out: expected None, as X is sparse")
        return scaled_sparse(method, x, copy, self._parameters(), _fitted_of(vars(self)))

    # --- statistics ---

    def var(self, ddof: int = 0) -> Float64:
        """Variance of each feature.

        Parameters
        ----------
        ddof : int
            The divisor is n - ddof: 0 for the population's variance, `var_`, 1 for the unbiased estimate.

        Returns
        -------
        (n_features,) float64 ndarray
            NaN where n <= ddof; n is `n_samples_seen_`.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before fit (without scikit-learn: an error that is a ValueError and an AttributeError, too).
        ValueError
            If the scaler was fitted without `with_std`.

        Examples
        --------
        >>> import bnfast
        >>> bnfast.StandardScaler().fit([[1.0], [3.0]]).var(ddof=1)
        array([2.])
        """
        self._check_is_fitted()
        state = vars(self)
        var, n = given(state, "var_"), np.asarray(state["n_samples_seen_"], dtype=np.float64)
        with np.errstate(all="ignore"):
            return np.where(n > ddof, var if ddof == 0 else var * (n / (n - ddof)), np.nan)

    # --- merge ---

    def merge(self, other: "StandardScaler") -> Self:
        """A scaler that is fitted to the data of both. `a + b` is the same, and `sum(scalers)` works.

        Parameters
        ----------
        other : StandardScaler
            Fitted, with the same parameters `with_mean` and `with_std`, to the same features.

        Returns
        -------
        StandardScaler
            New; the two stay as they are.

        Raises
        ------
        TypeError
            If `other` is no StandardScaler of bnfast.
        ValueError
            If one is not fitted, or they differ in parameters, number or names of features.

        Examples
        --------
        >>> import bnfast
        >>> parts = [bnfast.StandardScaler().fit(part) for part in ([[1.0], [2.0]], [[6.0]])]
        >>> parts[0].merge(parts[1]).mean_
        array([3.])
        """
        if not isinstance(other, StandardScaler):
            raise TypeError(f"other: expected a bnfast.StandardScaler, got {type(other).__name__}")
        self._check_is_fitted()
        other._check_is_fitted()
        for name in ("with_mean", "with_std", "n_features_in_"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other: expected {name}={getattr(self, name)}, got {getattr(other, name)}")
        mine, others = (getattr(scaler, "feature_names_in_", None) for scaler in (self, other))
        if mine is not None and others is not None and not np.array_equal(mine, others):
            raise ValueError(f"other: expected features {list(mine)}, got {list(others)}")
        result = copying.copy(self)
        wanted = self._wanted()
        found = merged(statistics_of(vars(self), **wanted), statistics_of(vars(other), **wanted))
        result._replace_fitted(attributes(found, others if mine is None else mine, **wanted))
        return result

    def to_sklearn(self) -> Any:
        """scikit-learn's scaler with these parameters and statistics, for what knows only theirs: ONNX, skops, ...

        Returns
        -------
        sklearn.preprocessing.StandardScaler
            Fitted if this one is; it shares no memory. What `set_output` chose for `transform` stays chosen.

        Raises
        ------
        TypeError
            If the scaler is of a subclass that has a `fit`, `fit_transform`, `partial_fit`, `transform` or
            `inverse_transform` of its own, which would be lost.

        Examples
        --------
        >>> import bnfast
        >>> bnfast.StandardScaler(with_std=False).fit([[1.0], [3.0]]).to_sklearn().mean_
        array([2.])
        """
        return to_sklearn(self, StandardScaler, FITTED)

    @classmethod
    def from_sklearn(cls, theirs: Any) -> Self:
        """A scaler with the parameters and statistics of scikit-learn's.

        Parameters
        ----------
        theirs : sklearn.preprocessing.StandardScaler
            Fitted or not; it is not changed.

        Returns
        -------
        StandardScaler
            Fitted if theirs is; `partial_fit` and `merge` go on from there. What `set_output` chose stays chosen.

        Raises
        ------
        TypeError
            If `theirs` is something else, or of a subclass that has a `fit`, `fit_transform`, `partial_fit`,
            `transform` or `inverse_transform` of its own, which would be lost.
        StateError
            If what it has been fitted to is not complete, or does not fit together.
        """
        parameters, state = state_of(theirs, FITTED)
        scaler = cls(**parameters)
        scaler.__setstate__(state)
        return scaler.set_output(transform=output_of(theirs))

    def __add__(self, other: object) -> Self:
        if not isinstance(other, StandardScaler):
            return NotImplemented
        return self.merge(other)

    def __radd__(self, other: object) -> Self:
        if isinstance(other, int) and other == 0:  # where sum() starts; a new one, as merge gives
            return copying.copy(self)
        return NotImplemented


def _fitted_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scaler's attributes is fitted."""
    return {name: state[name] for name in FITTED if name in state}
