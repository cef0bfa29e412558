"""Moments of data, channel by channel: exact statistics that merge."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import as_real, count_of_values
from .weighted import weighted_moments

__all__ = ["Moments", "moments"]


class Moments:
    """Count, mean and sum of squared deviations of each channel.

    Immutable. Moments of parts of the data add up to the moments of all of it, in any grouping, to rounding:
    `moments(a) + moments(b)`, `sum(list_of_moments)`, and `Moments.merge(parts)`, a tree in the order of the parts.

    Parameters
    ----------
    count : int or float
        Values a channel, at least 0; of weighted data the sum of the weights.
    mean : (C,) array_like
        Mean of each channel.
    m2 : (C,) array_like
        Sum of squared deviations from the mean of each channel, at least 0 (NaN is let through).

    Attributes
    ----------
    count : int or float
    mean, m2 : (C,) float64 ndarray, read-only

    Raises
    ------
    TypeError
        If `count` is no number, or `mean` and `m2` are not real numbers.
    ValueError
        If `count` is negative or not finite, the shapes differ or are not one-dimensional, or an `m2` is negative.

    Notes
    -----
    Merging is by Chan, Golub and LeVeque (1979): with n = a + b and d = mean_b - mean_a,
    mean = mean_a + d*b/n and m2 = m2_a + m2_b + d*d*a*b/n. Far from zero, d would lose what the means were rounded by:
    that is kept beside them, in pickles and rows too, so that merged moments are as exact as those of the whole.

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
    __slots__ = ("_rest", "count", "m2", "mean")
    count: int | float
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    _rest: NDArray[np.float64]  # mean + _rest is the mean

    def __init__(self, count: float, mean: ArrayLike, m2: ArrayLike) -> None:
        self._set(count, mean, m2, None)

    def _set(self, count: float, mean: ArrayLike, m2: ArrayLike, rest: ArrayLike | None) -> None:
        count = count_of_values(count, "count")
        mean_array, m2_array = per_channel(mean, "mean"), per_channel(m2, "m2")
        rest_array = per_channel(np.zeros(mean_array.shape) if rest is None else rest, "rest")
        if mean_array.shape != m2_array.shape:
            raise ValueError(f"m2: expected shape {mean_array.shape}, that of mean, got {m2_array.shape}")
        if bool((m2_array < 0).any()):
            raise ValueError(f"m2: expected values of at least 0, got {np.nanmin(m2_array)}")
        for name, value in (("count", count), ("mean", mean_array), ("m2", m2_array), ("_rest", rest_array)):
            object.__setattr__(self, name, value)

    @classmethod
    def with_rest(cls, count: float, mean: ArrayLike, m2: ArrayLike, rest: ArrayLike) -> "Moments":
        """Those whose means were rounded by `rest`."""
        new = cls.__new__(cls)
        new._set(count, mean, m2, rest)
        return new

    @classmethod
    def merge(cls, parts: Iterable["Moments"]) -> "Moments":
        """The moments of all parts, at least one: a tree in their order.

        Parameters
        ----------
        parts : iterable of Moments
            Of the same channels. Their order, and nothing else, decides about the last digits.

        Raises
        ------
        TypeError, ValueError
            If one is no Moments; if there is none, or the numbers of channels differ.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> bnfast.Moments.merge(bnfast.moments(part) for part in (x[:1], x[1:3], x[3:])).count
        6
        """
        found = list(parts)
        if not found:
            raise ValueError("parts: expected at least one Moments, got none")
        for part in found:
            if not isinstance(part, Moments):
                raise TypeError(f"parts: expected Moments, got {type(part).__name__}")
            if part.mean.shape != found[0].mean.shape:
                raise ValueError(f"parts: expected {found[0].mean.size} channels, got {part.mean.size}")
        return cls.from_row(_core.merge_moments_rows(np.stack([part.to_row() for part in found])), found)

    def to_row(self) -> NDArray[np.float64]:
        """These as numbers that can be sent: (1 + 3 C,) float64, of which `from_row` makes equal ones.

        They are count, the means, the m2, and what the means were rounded by.
        """
        return np.concatenate([[float(self.count)], self.mean, self.m2, self._rest])

    @classmethod
    def from_row(cls, row: ArrayLike, parts: Iterable["Moments"] | None = None) -> "Moments":
        """The moments that `to_row` gave as numbers.

        Parameters
        ----------
        row : (1 + 3 C,) array_like of real numbers
        parts : iterable of Moments, optional
            Whose sum is the count, exactly, whatever the row says.

        Raises
        ------
        TypeError, ValueError
            If it is no such row.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> m = bnfast.moments(np.array([[1.0, 10.0], [3.0, 30.0]]))
        >>> m.to_row()
        array([  2.,   2.,  20.,   2., 200.,   0.,   0.])
        >>> bnfast.Moments.from_row(m.to_row()) == m
        True
        """
        numbers = per_channel(row, "row")
        if numbers.size % 3 != 1:
            raise ValueError(f"row: expected 1 + 3 C numbers, got {numbers.size}")
        count = count_of_row(numbers[0]) if parts is None else sum(part.count for part in parts)
        return cls.with_rest(count, *numbers[1:].reshape(3, -1))

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
        return Moments.merge((self, other))

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
        made = Moments, (self.count, self.mean, self.m2)
        return (*made, self._rest) if self._rest.any() else made

    def __setstate__(self, rest: NDArray[np.float64]) -> None:
        self._set(self.count, self.mean, self.m2, rest)

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean!r}, m2={self.m2!r})"


def per_channel(value: ArrayLike, name: str) -> NDArray[np.float64]:
    """A read-only float64 copy, one value a channel."""
    array = as_real(np.asarray(value))
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape (channels,), got {array.shape}")
    copy = np.array(array, dtype=np.float64)
    copy.flags.writeable = False
    return copy


def count_of_row(count: float) -> int | float:
    """A row's first number as it was before: an int, unless weights made it a fraction."""
    number = float(count)
    return int(number) if number.is_integer() else number


def moments(x: ArrayLike, *, axis: int = 1, mask: ArrayLike | None = None, weights: ArrayLike | None = None) -> Moments:
    """Mean and sum of squared deviations of each channel, in one pass over memory.

    Parameters
    ----------
    x : (..., C, ...) array_like of float16, bfloat16, float32 or float64, at least 2 dimensions
    axis : int
        The channel axis.
    mask : bool array_like, broadcast to x's shape without its channel axis, optional
        Where True, the position takes part; elsewhere x may be anything, NaN too.
    weights : array_like of real numbers, broadcast as a mask is, optional
        How often each position counts: finite, at least 0. The count is their sum, a float. Where one is 0, x may be
        anything.

    Returns
    -------
    Moments
        In float64. Empty data give a count of 0.

    Raises
    ------
    TypeError
        If `x` is no array of such a dtype, `mask` not of bools, or `weights` not of real numbers.
    ValueError, numpy.exceptions.AxisError
        If `x` has fewer than 2 dimensions, or no such axis; if `mask` or `weights` do not broadcast; if a weight is
        negative or not finite.

    Notes
    -----
    Blocked Welford: a pivot is subtracted, sums are taken in fixed lanes, in float64 whatever the dtype of x, and
    blocks are merged as `Moments` are. The variance of float32 data is right to about 1e-15, at any mean.
    The result has the same bits for any number of threads and any instruction set.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bnfast.moments(np.array([[1.0, 10.0], [3.0, 30.0]])).mean
    array([ 2., 20.])
    >>> bnfast.moments(np.array([[1.0, 10.0], [3.0, 30.0]]), weights=[3, 1]).mean
    array([ 1.5, 15. ])
    """
    if weights is not None:
        return Moments.merge(Moments.with_rest(*part) for part in weighted_moments(x, axis, mask, weights))
    if mask is not None:
        positions = _core.positions_of(mask, x, axis)
        if not positions.all:
            x, axis = positions.gather(x, "x"), 1
    return Moments.with_rest(*_core.moments(x, axis))
