"""Feature scaling: scikit-learn's StandardScaler, faster, more accurate, and mergeable."""

import copy as copying
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from .._checks import flag, integer
from ..state.files import StateError
from .affine import mapped
from .columns import Statistics, merged, statistics
from .data import Array, Float64, as_table, as_weights, row_slices
from .estimator import Names, Transformer, feature_names

__all__ = ["StandardScaler"]

FITTED = ("mean_", "var_", "scale_", "n_samples_seen_", "n_features_in_", "feature_names_in_")
FITTED_ALWAYS = frozenset(FITTED) - {"feature_names_in_"}

# Bytes of a batch where progress is wanted and no batch size given.
BATCH_BYTES = 1 << 25


class StandardScaler(Transformer):
    """Scale each feature to mean 0 and standard deviation 1: z = (x - mean) / std.

    Constructor, methods, attributes and results are those of `sklearn.preprocessing.StandardScaler` on dense data;
    scikit-learn is not needed, and where it is installed the scaler works in its pipelines and searches. Beyond it:
    scalers of parts of the data merge, float32 data keep their digits when the mean is far from zero, `out=`, and data
    larger than memory.

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
        The standard deviation, 1 for features that are constant to rounding; None unless `with_std`.
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
    NaN are missing values: ignored in fit, kept in transform. Infinities are refused. Sparse data are, too: use
    `sklearn.preprocessing.StandardScaler(with_mean=False)` for them.

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
            float32 and float64 are read in place, once; other dtypes become float64, a chunk at a time. May be a
            memmap larger than memory.
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
            If X is sparse, masked, not two-dimensional, empty, complex, contains an infinity or no numbers; if
            `sample_weight` does not fit it, is not finite or all zero; if `batch_size` is no int of at least 1.

        Examples
        --------
        >>> import bnfast
        >>> bnfast.StandardScaler().fit([[1], [2], [6]], batch_size=2).mean_
        array([3.])
        """
        self._commit(*self._fitted(X, sample_weight, None, batch_size, progress))
        return self

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
        before = self if "n_features_in_" in vars(self) else None
        self._commit(*self._fitted(X, sample_weight, before, batch_size, progress))
        return self

    def _fitted(
        self,
        x: object,
        sample_weight: ArrayLike | None,
        before: "StandardScaler | None",
        batch_size: int | None,
        progress: bool,
    ) -> tuple[Statistics, Names | None]:
        """Statistics and names of the features of x, and of the data before; changes nothing."""
        for name in ("copy", "with_mean", "with_std"):
            flag(getattr(self, name), name)
        if batch_size is not None:
            batch_size = integer(batch_size, "batch_size")
            if batch_size < 1:
                raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        names = feature_names(x)
        if before is not None:
            before._check_feature_names(names)
            names = getattr(before, "feature_names_in_", None)
        data = as_table(x)
        if before is not None:
            before._check_n_features(data)
        weights = None if sample_weight is None else as_weights(sample_weight, len(data))

        batches = slices(data, batch_size, progress)
        parts = (
            statistics(data[rows], None if weights is None else weights[rows])
            for rows in (reported(batches, len(data)) if progress else batches)
        )
        earlier = [] if before is None else [before._statistics()]
        return functools.reduce(merged, itertools.chain(earlier, parts)), names

    def _statistics(self) -> Statistics:
        """What the scaler has been fitted to; what its parameters do not ask for is zero."""
        count, nothing = self.n_samples_seen_, np.zeros(self.n_features_in_)
        mean = self._given("mean_") if self.with_mean or self.with_std else nothing
        m2 = self._given("var_") * count if self.with_std else nothing
        return Statistics(count, mean, m2)

    def _commit(self, found: Statistics, names: Names | None) -> None:
        """Makes the statistics those of the scaler, all at once."""
        count, mean, m2 = found
        state: dict[str, Any] = dict.fromkeys(("mean_", "var_", "scale_"))
        if np.ndim(count) > 0 and (count == count[0]).all():
            count = count[0]
        state["n_samples_seen_"] = np.asarray(count)[()]
        state["n_features_in_"] = len(mean)
        if names is not None:
            state["feature_names_in_"] = names
        if self.with_mean or self.with_std:
            state["mean_"] = mean
        if self.with_std:
            with np.errstate(all="ignore"):
                var = m2 / count
                scale = np.sqrt(var)
                # scikit-learn's rule: the error that a variance in float64 may have, of a feature that is constant
                eps = np.finfo(np.float64).eps
                scale[var <= count * eps * var + (count * mean * eps) ** 2] = 1.0
            state["var_"], state["scale_"] = var, scale
        self.__dict__ = {name: value for name, value in vars(self).items() if name not in FITTED} | state

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        """Of a pickle or copy: refused with StateError where its parts do not fit each other."""
        try:
            state = dict(pickled)
            if not FITTED_ALWAYS.isdisjoint(state):
                _check_fitted(state)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise StateError(f"pickle: {error}") from error
        self.__dict__.update(state)

    # --- transform ---

    def transform(self, X: ArrayLike, copy: bool | None = None, *, out: Array | None = None) -> Any:
        """Scale X with the statistics that the scaler has been fitted to.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of numbers
        copy : bool, optional
            Instead of the scaler's own.
        out : ndarray, optional
            Where to write, of X's shape and the result's dtype; may be X. It is returned, whatever `set_output` says.

        Returns
        -------
        (n_samples, n_features) ndarray, or a data frame after `set_output`
            float16, float32 or float64 as X is; float64 for other dtypes.

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
        self._check_feature_names(feature_names(X))
        data = as_table(X)
        self._check_n_features(data)
        result = self._transformed(data, self.copy if copy is None else copy, out, search=True)
        return result if out is not None else self._wrapped(result, X)

    def fit_transform(
        self,
        X: ArrayLike,
        y: object = None,
        *,
        sample_weight: ArrayLike | None = None,
        out: Array | None = None,
    ) -> Any:
        """`fit`, then `transform` of the same data.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of numbers
        y : object
            Ignored.
        sample_weight : (n_samples,) array_like or float, optional
            Weights of the samples.
        out : ndarray, optional
            As in `transform`.

        Returns
        -------
        (n_samples, n_features) ndarray, or a data frame after `set_output`

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
        names, data = feature_names(X), as_table(X)
        fitted = copying.copy(self)
        found, _ = self._fitted(data, sample_weight, None, None, False)
        fitted._commit(found, names)
        # what has been fitted has no infinity
        result = fitted._transformed(data, self.copy, out, search=False)
        wrapped = result if out is not None else fitted._wrapped(result, X)
        self.__dict__ = vars(fitted)
        return wrapped

    def inverse_transform(self, X: ArrayLike, copy: bool | None = None, *, out: Array | None = None) -> Array:
        """Scale back: x = z * std + mean.

        Parameters
        ----------
        X : (n_samples, n_features) array_like of numbers
            What `transform` gave.
        copy : bool, optional
            Instead of the scaler's own.
        out : ndarray, optional
            As in `transform`.

        Returns
        -------
        (n_samples, n_features) ndarray

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
        data = as_table(X)
        self._check_n_features(data)
        scale = self._given("scale_") if self.with_std else np.ones(data.shape[1])
        center, shift = np.zeros(data.shape[1]), np.full(data.shape[1], -0.0)
        if self.with_mean:
            # what is lost of the mean when it becomes float32 is added before the multiplication
            mean = self._given("mean_")
            with np.errstate(over="ignore", invalid="ignore"):
                shift = mean.astype(np.float32).astype(np.float64) if data.dtype == np.float32 else mean
                center = np.where(np.isfinite(shift), (shift - mean) / scale, 0.0)
        return mapped(data, center, scale, shift, self.copy if copy is None else copy, out, search=True)

    def _transformed(self, data: Array, copy: bool, out: Array | None, *, search: bool) -> Array:
        center = self._given("mean_") if self.with_mean else np.zeros(data.shape[1])
        scale = 1.0 / self._given("scale_") if self.with_std else np.ones(data.shape[1])
        shift = None if self.with_mean else np.full(data.shape[1], -0.0)  # which leaves the sign of a zero
        return mapped(data, center, scale, shift, copy, out, search=search)

    def _given(self, name: str) -> Float64:
        """A fitted attribute that the parameters ask for."""
        value: Float64 | None = getattr(self, name)
        if value is None:
            raise ValueError(f"{name}: expected an array, got None: with_mean or with_std has changed since the fit")
        return value

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
        result._commit(merged(self._statistics(), other._statistics()), others if mine is None else mine)
        return result

    def __add__(self, other: object) -> Self:
        if not isinstance(other, StandardScaler):
            return NotImplemented
        return self.merge(other)

    def __radd__(self, other: object) -> Self:
        if isinstance(other, int) and other == 0:  # where sum() starts; a new one, as merge gives
            return copying.copy(self)
        return NotImplemented


# --- fitted state, batches ---


def _check_fitted(state: dict[str, Any]) -> None:
    """Raises if what a fitted scaler consists of is not complete, or parts of it do not fit."""
    if missing := FITTED_ALWAYS - state.keys():
        raise ValueError(f"missing {sorted(missing)}")
    features = integer(state["n_features_in_"], "n_features_in_")
    for name, smallest in (("mean_", -np.inf), ("var_", 0), ("scale_", 0), ("n_samples_seen_", 0)):
        if state[name] is None and name != "n_samples_seen_":
            continue
        array = np.asarray(state[name])
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
        if array.shape != (features,) and not (name == "n_samples_seen_" and array.shape == ()):
            raise ValueError(f"{name}: expected shape ({features},), got {array.shape}")
        if bool((array < smallest).any()):
            raise ValueError(f"{name}: expected values of at least {smallest}")
    names = state.get("feature_names_in_")
    if names is not None and np.shape(names) != (features,):
        raise ValueError(f"feature_names_in_: expected shape ({features},), got {np.shape(names)}")


def slices(data: Array, batch_size: int | None, progress: bool) -> list[slice]:
    """The batches of a fit."""
    if batch_size is None:
        if not progress:
            return [slice(0, len(data))]
        batch_size = max(1, BATCH_BYTES // (data.itemsize * data.shape[1]))
    return row_slices(data, batch_size)


def reported(batches: list[slice], n_rows: int) -> Iterator[slice]:
    """The batches, with a line on the standard error stream that says how far they are."""
    begin = time.monotonic()
    for rows in batches:
        yield rows
        seconds = time.monotonic() - begin
        left = seconds * (n_rows - rows.stop) / rows.stop
        line = f"StandardScaler: {rows.stop:,} of {n_rows:,} rows ({100 * rows.stop // n_rows} %), {left:.0f} s left"
        print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
