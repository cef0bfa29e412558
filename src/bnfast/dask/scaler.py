"""`StandardScaler` on dask arrays and data frames: a fit computes once, a transform stays lazy."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from dask.array import Array

from .._checks import is_bfloat16
from ..scaling import lazy
from ..scaling.columns import Statistics, merged, statistics
from .reduction import reduced

__all__ = ["take_collections"]

Scaled = Callable[[np.ndarray, slice], np.ndarray]


def _of_chunk(chunk: Any) -> Statistics:
    array = np.asarray(chunk)
    if array.size == 0:
        return Statistics(0, *np.zeros((2, array.shape[1])))
    return statistics(array)


def _merged(parts: list[Statistics]) -> Statistics:
    return functools.reduce(merged, parts)


def _side_by_side(parts: list[Statistics]) -> Statistics:
    counts = np.concatenate([np.broadcast_to(part.count, part.mean.shape) for part in parts])
    distinct = np.unique(counts)
    count = distinct[0] if len(distinct) == 1 else counts
    rests = [np.broadcast_to(part.rest, part.mean.shape) for part in parts]
    columns = ([part.mean for part in parts], [part.m2 for part in parts], rests)
    return Statistics(count, *map(np.concatenate, columns))


def _result_dtype(dtype: Any) -> np.dtype[Any]:
    """As of arrays: floats keep theirs; of pandas' own, as Float32, that of NumPy's."""
    if is_bfloat16(dtype):
        return dtype  # type: ignore[no-any-return]
    size = getattr(dtype, "itemsize", 8)
    return np.dtype(f"f{size}" if dtype.kind == "f" and size <= 8 else np.float64)


class _Arrays:
    def handles(self, x: object) -> bool:
        return isinstance(x, Array) and x.ndim == 2

    def statistics(self, x: Array) -> Statistics:
        if x.dtype.kind not in "fiub" and not is_bfloat16(x.dtype):
            raise TypeError(f"X: expected numbers, got dtype {x.dtype}")
        found: Statistics = reduced(x, 1, _of_chunk, _merged, _side_by_side).compute()
        return found

    def mapped(self, x: Array, scaled: Scaled) -> Array:
        ends = np.cumsum((0, *x.chunks[1]))
        columns = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        return x.map_blocks(
            _scaled_block, scaled, columns, dtype=_result_dtype(x.dtype), meta=np.empty((0, 0), _result_dtype(x.dtype))
        )


def _scaled_block(block: np.ndarray, scaled: Scaled, columns: list[slice], block_id: Any = None) -> np.ndarray:
    return scaled(np.asarray(block), columns[block_id[1]]) if block.size else block.astype(_result_dtype(block.dtype))


class _Frames:
    def handles(self, x: object) -> bool:
        return hasattr(x, "map_partitions") and hasattr(x, "columns")

    def statistics(self, x: Any) -> Statistics:
        return _Arrays().statistics(x.astype(_float_dtypes(x)).to_dask_array())

    def mapped(self, x: Any, scaled: Scaled) -> Any:
        return x.map_partitions(_scaled_frame, scaled, meta=_scaled_frame(x._meta, None))


def _float_dtypes(frame: Any) -> dict[Any, np.dtype[Any]]:
    """Those of the result's columns; what is missing in pandas' own is NaN in them."""
    for name, dtype in frame.dtypes.items():
        if dtype.kind not in "fiub":
            raise TypeError(f"X: expected numbers, got dtype {dtype} in column {name!r}")
    return {name: _result_dtype(dtype) for name, dtype in frame.dtypes.items()}


def _scaled_frame(frame: Any, scaled: Scaled | None) -> Any:
    """A frame with the same names, index, and dtypes of floats."""
    dtypes = _float_dtypes(frame)
    floats = frame.astype(dtypes)
    if scaled is None or len(frame) == 0:
        return floats
    values = scaled(floats.to_numpy(), slice(0, frame.shape[1]))
    return type(frame)(values, index=frame.index, columns=frame.columns).astype(dtypes)


def take_collections() -> None:
    """From now on the scaler takes dask's."""
    lazy.register(_Arrays())
    lazy.register(_Frames())
