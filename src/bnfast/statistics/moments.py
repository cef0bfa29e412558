"""Moments of data, channel by channel: exact statistics that merge."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import integer

__all__ = ["Moments", "moments"]


class Moments:
    """Count, mean and sum of squared deviations of each channel.

    Immutable. Moments of parts of the data add up to the moments of all of it, in any grouping, to rounding:
    `moments(a) + moments(b)`, `sum(list_of_moments)`.

    Parameters
    ----------
    count : int
        Values a channel, at least 0.
    mean : (C,) array_like
        Mean of each channel.
    m2 : (C,) array_like
        Sum of squared deviations from the mean of each channel, at least 0 (NaN is let through).

    Attributes
    ----------
    count : int
    mean, m2 : (C,) float64 ndarray, read-only

    Raises
    ------
    TypeError
        If `count` is not an int, or `mean` and `m2` are not real numbers.
    ValueError
        If `count` is negative, the shapes differ or are not one-dimensional, or an `m2` is negative.

    Notes
    -----
    Merging is by Chan, Golub and LeVeque (1979): with n = a + b and d = mean_b - mean_a,
    mean = mean_a + d*b/n and m2 = m2_a + m2_b + d*d*a*b/n.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> whole = bnfast.moments(x[:4]) + bnfast.moments(x[4:])
    >>> whole.mean
    array([5., 6.])
    >>> whole.var()
    array([11.66666667, 11.66666667])
    """

    __module__ = "bnfast"  # where it is found, also by pickles
    __slots__ = ("count", "m2", "mean")
    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    def __init__(self, count: int, mean: ArrayLike, m2: ArrayLike) -> None:
        count = integer(count, "count")
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        mean_array, m2_array = per_channel(mean, "mean"), per_channel(m2, "m2")
        if mean_array.shape != m2_array.shape:
            raise ValueError(f"m2: expected shape {mean_array.shape}, that of mean, got {m2_array.shape}")
        if bool((m2_array < 0).any()):
            raise ValueError(f"m2: expected values of at least 0, got {np.nanmin(m2_array)}")
        for name, value in (("count", count), ("mean", mean_array), ("m2", m2_array)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Moments are immutable: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Moments are immutable: cannot delete {name}")

    def var(self, ddof: int = 0) -> NDArray[np.float64]:
        """Variance of each channel.

        Parameters
        ----------
        ddof : int
            The divisor is count - ddof: 0 for the population's variance, 1 for the unbiased estimate.

        Returns
        -------
        (C,) float64 ndarray
            NaN where count <= ddof.
        """
        if self.count <= ddof:
            return np.full_like(self.m2, np.nan)
        return self.m2 / (self.count - ddof)

    def std(self, ddof: int = 0) -> NDArray[np.float64]:
        """Standard deviation of each channel: the root of `var(ddof)`."""
        return np.sqrt(self.var(ddof))

    def __add__(self, other: object) -> "Moments":
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"other: expected {self.mean.size} channels, got {other.mean.size}")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        with np.errstate(all="ignore"):
            d = other.mean - self.mean
            mean = self.mean + d * (other.count / count)
            m2 = self.m2 + other.m2 + d * d * (self.count * (other.count / count))
        return Moments(count, mean, m2)

    def __radd__(self, other: object) -> "Moments":
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        return NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.mean, other.mean, equal_nan=True)
            and np.array_equal(self.m2, other.m2, equal_nan=True)
        )

    def __hash__(self) -> int:
        # equal moments may differ in the bits of NaN and of zero: + 0.0 makes -0.0 0.0
        return hash((self.count, np.where(np.isnan(self.mean), np.nan, self.mean + 0.0).tobytes()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments, (self.count, self.mean, self.m2)

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean!r}, m2={self.m2!r})"


def per_channel(value: ArrayLike, name: str) -> NDArray[np.float64]:
    """A read-only float64 copy, one value a channel."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape (channels,), got {array.shape}")
    copy = np.array(array, dtype=np.float64)
    copy.flags.writeable = False
    return copy


def moments(x: ArrayLike, *, axis: int = 1, mask: ArrayLike | None = None) -> Moments:
    """Mean and sum of squared deviations of each channel, in one pass over memory.

    Parameters
    ----------
    x : (..., C, ...) array_like of float32 or float64, at least 2 dimensions
    axis : int
        The channel axis.
    mask : bool array_like, broadcast to x's shape without its channel axis, optional
        Where True, the position takes part; elsewhere x may be anything, NaN too.

    Returns
    -------
    Moments
        In float64. Empty data give a count of 0.

    Raises
    ------
    TypeError
        If `x` is not a float32 or float64 array, or `mask` not of bools.
    ValueError, numpy.exceptions.AxisError
        If `x` has fewer than 2 dimensions, or no such axis, or `mask` does not broadcast.

    Notes
    -----
    Blocked Welford: a pivot is subtracted, sums are taken in fixed lanes, blocks are merged as `Moments` are.
    The result has the same bits for any number of threads and any instruction set.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bnfast.moments(np.array([[1.0, 10.0], [3.0, 30.0]])).mean
    array([ 2., 20.])
    """
    if mask is not None:
        positions = _core.positions_of(mask, x, axis)
        if not positions.all:
            x, axis = positions.gather(x, "x"), 1
    return Moments(*_core.moments(x, axis))
