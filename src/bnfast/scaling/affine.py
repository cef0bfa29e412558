"""The map of a table's columns: (x - center) * scale + shift."""

from typing import Any

import numpy as np

from .. import _core
from .columns import statistics
from .data import Array, Float64, chunks, infinity_error, is_native

__all__ = ["mapped"]

# Coefficients beyond these are not for float32: their reciprocals, or data less a mean, may leave its range.
FLOAT32_RANGE = (1e-37, 1e37)


def mapped(
    data: Array, center: Float64, scale: Float64, shift: Float64 | None, copy: bool, out: Array | None, *, search: bool
) -> Array:
    """(data - center) * scale + shift; ValueError for an infinity if `search`. Not `copy`: into data."""
    dtype = result_dtype(data)
    if out is not None:
        _core.check_out(out, data if data.dtype == dtype else np.broadcast_to(np.empty((), dtype), data.shape))
    elif not copy and data.dtype == dtype and data.flags.writeable:
        out = data
    in_place = out is not None and _core.shares_memory(out, data)
    if out is not None and search:  # before anything is written
        statistics(data)
        search = False
    if is_native(data) and (dtype != np.float32 or in_float32_range(center, scale, shift)):
        y, infinite = _core.affine(data, center, scale, shift, out, search)
        if infinite:
            raise infinity_error(data.dtype)
        return y
    y = np.empty_like(data, dtype, subok=False) if out is None or in_place else out
    for rows in chunks(data):
        part = y[rows] if dtype == np.float64 else np.empty_like(data[rows], np.float64)
        part[...] = data[rows]
        if _core.affine(part, center, scale, shift, part, search)[1]:
            raise infinity_error(data.dtype)
        if dtype != np.float64:
            y[rows] = part
    if out is None or y is out:
        return y
    out[...] = y
    return out


def in_float32_range(center: Float64, scale: Float64, shift: Float64 | None) -> bool:
    """Whether the map can be computed in float32. NaN can."""
    low, high = FLOAT32_RANGE
    far = (np.abs(center) > high).any() or (shift is not None and (np.abs(shift) > high).any())
    return not (far or (scale < low).any() or (scale > high).any())


def result_dtype(data: Array) -> np.dtype[Any]:
    """float16, float32, float64 as they are, float64 for the rest."""
    kept = data.dtype.kind == "f" and data.dtype.itemsize <= 8
    return data.dtype.newbyteorder("=") if kept else np.dtype(np.float64)
