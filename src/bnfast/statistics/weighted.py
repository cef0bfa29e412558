"""Moments of positions that count more or less often than once."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core

__all__ = ["weighted_moments"]

Float64 = NDArray[np.float64]
Part = tuple[float, Float64, Float64, Float64]  # sum of weights, mean, m2, rest: mean + rest is the mean
BLOCK = 1 << 18  # elements that are copied at once


def checked_weights(weights: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """As an array of the positions' shape, perhaps a view."""
    given = np.asarray(weights)
    if isinstance(weights, np.ma.MaskedArray):
        raise TypeError(f"weights: expected an array without a mask, got {type(weights).__name__}")
    if given.dtype.kind not in "fiub":
        raise TypeError(f"weights: expected real numbers, got dtype {given.dtype}")
    if given.ndim > len(shape):
        raise ValueError(f"weights: expected x's shape without its channel axis, {shape}, got {given.shape}")
    numbers = given.astype(np.float64)
    unfit = numbers[~(np.isfinite(numbers) & (numbers >= 0))]
    if unfit.size:
        raise ValueError(f"weights: expected finite values of at least 0, got {unfit.flat[0]}")
    try:
        return np.broadcast_to(numbers, shape)
    except ValueError:
        raise ValueError(
            f"weights: expected a shape that broadcasts to {shape}, that of x without its channel axis, "
            f"got {given.shape}"
        ) from None


def weighted_moments(x: ArrayLike, axis: int, mask: ArrayLike | None, weights: ArrayLike) -> Iterator[Part]:
    """Those of parts of x, at least one.

    Each part in two passes by the kernels: sum(w), sum(w * x) about a value of the channel, then sum(w * d) and
    sum(w * d * d) about the mean, d = x - mean; so no bit depends on the CPU.
    """
    data = _core.as_data(x, "x")
    _core.moments(data[:0] if data.ndim else data, axis)  # its checks, of dtype, dimensions and axis
    axis %= data.ndim
    shape = data.shape[:axis] + data.shape[axis + 1 :]
    given = checked_weights(weights, shape)
    if mask is not None:
        taking_part = _core.mask_of(mask, data, axis)
        given = np.where(taking_part, given, 0.0)
    yield from _parts(data, axis, given)


def _parts(data: NDArray[np.floating], axis: int, weights: Float64) -> Iterator[Part]:
    cut = 1 if axis == 0 else 0  # the axis that is cut into parts
    rows = max(1, BLOCK * data.shape[cut] // max(1, data.size))
    for begin in range(0, max(1, data.shape[cut]), rows):
        part = (slice(None),) * cut + (slice(begin, begin + rows),)
        yield _moments(data[part].astype(np.float64), axis, weights[begin : begin + rows])


def _moments(x: Float64, axis: int, weights: Float64) -> Part:
    """Of one part, in whose place is worked."""
    channels = x.shape[axis]
    along_x = np.expand_dims(weights, axis)
    w = np.empty_like(x)
    w[...] = along_x
    x[w == 0] = 0.0
    taking_part = np.argwhere(weights)
    if not len(taking_part):
        return 0.0, *np.zeros((3, channels))
    first = np.moveaxis(x, axis, -1)[tuple(taking_part[len(taking_part) // 2])]
    center = np.where(np.isfinite(first), first, 0.0)
    ones = np.ones(channels)

    def sums(dy: Float64, about: Float64) -> tuple[Float64, Float64]:
        _, of_products, of_weights = _core.batch_norm_backward_sums(
            dy, x, about, ones, None, axis, None, None, None, 0.01
        )
        return of_products, of_weights

    with np.errstate(all="ignore"):
        of_products, of_weights = sums(w, center)
        count = of_weights[0]
        mean = center + of_products / count
        w *= x - np.expand_dims(mean, [i for i in range(x.ndim) if i != axis])
        m2, residual = sums(w, mean)
        rest = residual / count  # what the mean was rounded by, and what the first pass was off by
        m2 = np.maximum(m2 - residual * rest, 0.0)
        return float(count), mean, m2, np.where(np.isfinite(rest), rest, 0.0)
