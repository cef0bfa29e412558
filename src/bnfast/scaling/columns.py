"""Statistics of the columns of a table, with NaN left out and samples weighted; they merge."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .data import Array, Float64, chunks, infinity_error, is_dense, is_native

__all__ = ["Statistics", "merged", "statistics"]

WEIGHTED_CHUNK = 1 << 15  # elements whose differences and products stay in cache
NEAR = 15 / 16  # of a sum of squares that a pivot beside the mean may take: 4 bits


class Statistics(NamedTuple):
    """Moments whose count may differ from feature to feature, or be a sum of weights."""

    count: Any  # a number, or (n_features,)
    mean: Float64
    m2: Float64
    rest: Any = 0.0  # mean + rest is the mean


def merged(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both parts: Chan, Golub and LeVeque, where neither is empty."""
    count = np.add(a.count, b.count)
    with np.errstate(all="ignore"):
        d = (b.mean - a.mean) + (b.rest - a.rest)
        share = b.count / count
        step = a.rest + d * share
        mean = a.mean + step
        rest = (a.mean - (mean - (mean - a.mean))) + (step - (mean - a.mean))  # Knuth's two-sum
        m2 = a.m2 + b.m2 + d * d * (a.count * share)
    only_a, only_b = np.equal(b.count, 0), np.equal(a.count, 0)
    return Statistics(
        count,
        np.where(only_a, a.mean, np.where(only_b, b.mean, mean)),
        np.where(only_a, a.m2, np.where(only_b, b.m2, m2)),
        np.nan_to_num(np.where(only_a, a.rest, np.where(only_b, b.rest, rest)), posinf=0.0, neginf=0.0),
    )


def statistics(data: Array, weights: Float64 | None = None) -> Statistics:
    """Statistics of the features of data without NaN; ValueError if there is an infinity."""
    if weights is not None:
        return weighted(data, weights)
    if not is_native(data):
        return over_chunks(data, lambda rows: statistics(data[rows].astype(np.float64)))
    if not is_dense(data):  # a chunk's copy stays in cache
        return over_chunks(data, lambda rows: statistics(np.array(data[rows])))
    count, mean, m2, rest = _core.moments(data, 1)
    # a NaN or an infinity shows in the moments of its column: only then are the data looked at again
    odd = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))
    if len(odd) == 0:
        return Statistics(count, mean, m2, rest)
    if len(odd) == len(mean):
        return over_chunks(data, lambda rows: exact(data[rows], None))
    counts = np.full(len(mean), count)
    counts[odd], mean[odd], m2[odd], rest[odd] = over_chunks(data, lambda rows: exact(data[rows, odd], None))
    return Statistics(counts, mean, m2, rest)


def weighted(data: Array, weights: Float64) -> Statistics:
    """`statistics` with weights; those times a power of two give the same mean and m2 / count, to the bit."""
    unit = -int(np.frexp(weights.max())[1])  # sums of weights near 1 neither overflow nor vanish
    origin = np.nan_to_num(
        data[0].astype(np.float64)
    )  # means are kept less this one: far from zero they lose no digits
    found = None
    for rows in chunks(data, WEIGHTED_CHUNK):
        chunk, share = data[rows], np.ldexp(weights[rows], unit)
        pivot = origin if found is None else origin + found.mean
        part = near(chunk, share, pivot, origin) or exact(chunk, share, origin)
        found = part if found is None else merged(found, part)
    assert found is not None  # data have rows
    with np.errstate(over="ignore", under="ignore"):
        return Statistics(np.ldexp(found.count, -unit), origin + found.mean, np.ldexp(found.m2, -unit))


def near(chunk: Array, weights: Float64, pivot: Float64, origin: Float64) -> Statistics | None:
    """`exact` in one pass, None if there are values that are not finite, or `pivot` is 4 deviations from the mean."""
    with np.errstate(all="ignore"):
        d = np.subtract(chunk, pivot, out=np.empty(chunk.shape), dtype=np.float64)
        products = d * weights[:, None]
        count, first = np.add.reduce(weights), np.add.reduce(products, axis=0)
        products *= d
        second = np.add.reduce(products, axis=0)
        lost = first * (first / count)
        if not (np.isfinite(second) & (lost <= NEAR * second)).all():
            return None
        return Statistics(count, (pivot - origin) + first / count, second - lost)


def over_chunks(data: Array, statistics_of: Callable[[slice], Statistics]) -> Statistics:
    return functools.reduce(merged, map(statistics_of, chunks(data)))


def exact(chunk: Array, weights: Float64 | None, origin: Float64 | float = 0.0) -> Statistics:
    """`statistics` in NumPy, for what may have NaN or weights, means less `origin`: two passes, the second corrected.

    Sums run down the rows, one after another: in an order that depends on the shape alone, as no BLAS promises. What is
    summed is the distance from the first value that is there, so that a constant has variance 0.
    """

    def total(values: NDArray[Any]) -> Float64:
        found: Float64 = np.add.reduce(values if weights is None else weights[:, None] * values, axis=0)
        return found

    x = chunk.astype(np.float64, order="C")
    present = ~np.isnan(x)
    some_missing = not present.all()
    count: Any = len(x) if weights is None else np.add.reduce(weights)
    counted = present if weights is None else present & (weights > 0)[:, None]
    pivot = x[counted.argmax(axis=0), np.arange(x.shape[1])]
    if some_missing:
        count = total(present)
        pivot[~counted.any(axis=0)] = 0.0
    with np.errstate(all="ignore"):
        x -= pivot
        if some_missing:
            x[~present] = 0.0
        shift = total(x) / count
        mean = (pivot - origin) + shift
        if not np.isfinite(mean).all() and np.isinf(chunk).any():
            raise infinity_error(chunk.dtype)
        x -= shift
        if some_missing:
            x[~present] = 0.0
        rest = total(x)
        x *= x
        return Statistics(count, mean + rest / count, np.maximum(total(x) - rest * (rest / count), 0.0))
