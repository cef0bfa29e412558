"""Parts of an array that a check looks at by themselves.

One direction through all of an array says little of entries that are far smaller than the others: their share of the
slope drowns, and a step that suits the large entries is none for the small. So where the slices along an axis (the
entries of a vector, the columns of a matrix, the channels of a batch) differ in size by more than a ratio, in the array
or in its gradient, those of about one size are a part, with directions of its own.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .differences import Array, Float64

__all__ = ["Part", "parts_of"]


class Part(NamedTuple):
    """Some entries of an array, and how far each is moved by a step."""

    label: str  # "" of all entries, "[:, 3]"
    reach: Float64  # of the array's shape: 0 outside of the part, 1 for its largest entries


def parts_of(x: Array, gradient: Float64, ratio: float, negligible: float) -> Iterator[Part]:
    """The whole array, then its parts; gradients below `negligible` times the largest are zero, but for rounding."""
    sizes, slopes = np.abs(x).astype(np.float64), np.abs(gradient)
    slopes = np.where(np.isfinite(slopes), slopes, 0.0)
    axes = [axis for axis, n in enumerate(x.shape) if n > 1]
    of_x = {axis: classes(slice_sizes(sizes, axis), ratio, 0.0) for axis in axes}
    of_gradient = {axis: classes(slice_sizes(slopes, axis), ratio, negligible) for axis in axes}
    reach = np.ones(x.shape)
    for axis in axes:
        # zeros say nothing of the scale on which the function changes
        steps = ratio ** -np.maximum(of_x[axis], 0.0)
        reach = np.minimum(reach, along(steps, axis, x.ndim))
    yield Part("", reach)
    for axis in axes:
        kinds = np.stack([of_gradient[axis], np.maximum(of_x[axis], 0.0)], axis=1)
        found = np.unique(kinds, axis=0)
        if len(found) == 1:
            continue
        weights = slice_sizes(slopes * reach, axis)
        dominant = kinds[int(weights.argmax())]  # what directions through all of it show
        for kind in found:
            if not (kind == dominant).all():
                chosen = (kinds == kind).all(axis=1)
                inside = np.broadcast_to(along(chosen.astype(np.float64), axis, x.ndim), x.shape) * reach
                yield Part(label(np.flatnonzero(chosen), axis, x.shape), inside / inside.max())


def slice_sizes(values: Float64, axis: int) -> Float64:
    """Root mean square of each slice, without overflow."""
    largest = float(values.max(initial=0.0))
    if largest == 0:
        return np.zeros(values.shape[axis])
    others = tuple(i for i in range(values.ndim) if i != axis)
    rms: Float64 = np.sqrt(np.mean(np.square(values / largest), axis=others)) * largest
    return rms


def classes(sizes: Float64, ratio: float, negligible: float) -> Float64:
    """0 for sizes within `ratio` of the largest, 1 within its square, ...; -1 for zero and negligible ones."""
    largest = sizes.max()
    found = np.full(sizes.shape, -1.0)
    counted = sizes > negligible * largest
    found[counted] = np.floor(np.log(largest / sizes[counted]) / np.log(ratio))
    return found


def along(values: Float64, axis: int, ndim: int) -> Float64:
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


def label(chosen: NDArray[np.intp], axis: int, shape: tuple[int, ...]) -> str:
    """As one would index it: "[:, 3]", "[:, [3, 7]]"; of many the first and how many more."""
    indices = [int(index) for index in chosen[:3]]
    text: Any = indices[0] if len(chosen) == 1 else indices
    if len(chosen) > 3:
        text = f"{indices[0]} and {len(chosen) - 1} more"
    return f"[{':, ' * axis}{text}{', ...' if axis < len(shape) - 1 else ''}]"
