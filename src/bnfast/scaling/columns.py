"""Statistics of the columns of a table, with NaN left out and samples weighted; they merge."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .data import Array, Float64, chunks, infinity_error, is_native

__all__ = ["Statistics", "merged", "statistics"]


class Statistics(NamedTuple):
    """Moments whose count may differ from feature to feature, or be a sum of weights."""

    count: Any  # a number, or (n_features,)
    mean: Float64
    m2: Float64


def merged(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both parts: Chan, Golub and LeVeque, where neither is empty."""
    count = np.add(a.count, b.count)
    with np.errstate(all="ignore"):
        d = b.mean - a.mean
        share = b.count / count
        mean = a.mean + d * share
        m2 = a.m2 + b.m2 + d * d * (a.count * share)
    only_a, only_b = np.equal(b.count, 0), np.equal(a.count, 0)
    return Statistics(
        count,
        np.where(only_a, a.mean, np.where(only_b, b.mean, mean)),
        np.where(only_a, a.m2, np.where(only_b, b.m2, m2)),
    )


def statistics(data: Array, weights: Float64 | None = None) -> Statistics:
    """Statistics of the features of data without NaN; ValueError if there is an infinity."""
    if weights is not None:
        return over_chunks(data, lambda rows: exact(data[rows], weights[rows]))
    if not is_native(data):
        return over_chunks(data, lambda rows: statistics(data[rows].astype(np.float64)))
    count, mean, m2 = _core.moments(data, 1)
    # a NaN or an infinity shows in the moments of its column: only then are the data looked at again
    odd = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))
    if len(odd) == 0:
        return Statistics(count, mean, m2)
    if len(odd) == len(mean):
        return over_chunks(data, lambda rows: exact(data[rows], None))
    counts = np.full(len(mean), count)
    counts[odd], mean[odd], m2[odd] = over_chunks(data, lambda rows: exact(data[rows, odd], None))
    return Statistics(counts, mean, m2)


def over_chunks(data: Array, statistics_of: Callable[[slice], Statistics]) -> Statistics:
    return functools.reduce(merged, map(statistics_of, chunks(data)))


def exact(chunk: Array, weights: Float64 | None) -> Statistics:
    """`statistics` in NumPy, for what may have NaN or weights: two passes, the second one corrected."""

    def total(values: NDArray[Any]) -> Float64:
        found: Float64 = values.sum(axis=0) if weights is None else weights @ values
        return found

    x = chunk.astype(np.float64)
    present = ~np.isnan(x)
    some_missing = not present.all()
    count: Any = len(x) if weights is None else weights.sum()
    if some_missing:
        count = total(present)
        x[~present] = 0.0
    with np.errstate(all="ignore"):
        mean = total(x) / count
        if not np.isfinite(mean).all() and np.isinf(x).any():
            raise infinity_error(chunk.dtype)
        x -= mean
        if some_missing:
            x[~present] = 0.0
        rest = total(x)
        x *= x
        return Statistics(count, mean + rest / count, np.maximum(total(x) - rest * (rest / count), 0.0))
