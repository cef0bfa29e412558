"""The map of a table's columns: (x - center) * scale + shift."""

from typing import Any

import numpy as np

from .. import _core
from .._checks import is_bfloat16
from .batches import batches_of
from .columns import statistics
from .data import Array, Float64, chunks, infinity_error, is_dense, is_native

__all__ = ["mapped", "mapped_columns", "mapped_in_batches"]

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
    native = is_native(data) and (dtype != np.float32 or in_float32_range(center, scale, shift))
    if native and not is_dense(data) and (not in_place or lies_as(out, data)):
        y = np.empty_like(data, subok=False) if out is None else out
        for rows in chunks(data):  # of which the copy stays in cache
            if _core.affine(data[rows], center, scale, shift, y[rows], search)[1]:
                raise infinity_error(data.dtype)
        return y
    if native:
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


Coefficients = tuple[Float64, Float64, Float64 | None]


def mapped_columns(narrow: Coefficients, wide: Coefficients, data: Array, columns: slice) -> Array:
    """`mapped` of data that have these columns of a table. narrow, wide: coefficients of float32, of other dtypes."""
    center, scale, shift = narrow if data.dtype == np.float32 else wide
    return mapped(
        data, center[columns], scale[columns], None if shift is None else shift[columns], True, None, search=True
    )


def mapped_in_batches(
    data: Array,
    center: Float64,
    scale: Float64,
    shift: Float64 | None,
    copy: bool,
    out: Array | None,
    batch_size: int | None,
    progress: bool,
) -> Array:
    """`mapped`, some rows at a time; what is searched for infinities before anything is written is, too."""
    dtype = result_dtype(data)
    model = data if data.dtype == dtype else np.broadcast_to(np.empty((), dtype), data.shape)
    if out is None and not copy and data.dtype == dtype and data.flags.writeable:
        out = data
    if out is not None:
        _core.check_out(out, model)
        if _core.shares_memory(out, data) and not lies_as(out, data):  # a row that is written may be a later one's data
            return mapped(data, center, scale, shift, copy, out, search=True)
        for rows in batches_of(data, batch_size, False):
            statistics(data[rows])
    y = np.empty_like(data, dtype, subok=False) if out is None else out
    for rows in batches_of(data, batch_size, progress):
        mapped(data[rows], center, scale, shift, True, y[rows], search=out is None)
    return y


def lies_as(out: Array | None, data: Array) -> bool:
    """Whether equal indices are equal places in memory."""
    if out is None or (out.dtype, out.shape, out.strides) != (data.dtype, data.shape, data.strides):
        return False
    return bool(out.ctypes.data == data.ctypes.data)


def in_float32_range(center: Float64, scale: Float64, shift: Float64 | None) -> bool:
    """Whether the map can be computed in float32. NaN can."""
    low, high = FLOAT32_RANGE
    far = (np.abs(center) > high).any() or (shift is not None and (np.abs(shift) > high).any())
    return not (far or (scale < low).any() or (scale > high).any())


def result_dtype(data: Array) -> np.dtype[Any]:
    """float16, bfloat16, float32, float64 as they are, float64 for the rest."""
    kept = (data.dtype.kind == "f" and data.dtype.itemsize <= 8) or is_bfloat16(data.dtype)
    return data.dtype.newbyteorder("=") if kept else np.dtype(np.float64)
