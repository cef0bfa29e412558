"""Moments of a dask array: of each chunk by the kernels, rows merged as a tree, in the order of the chunks."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from dask.array import Array
from dask.base import tokenize
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from numpy.exceptions import AxisError

from .._checks import is_half
from ..statistics.moments import Moments
from ..statistics.moments import moments as moments_of_chunk

__all__ = ["moments", "reduced"]

SPLIT = 8  # rows that are merged at once


def moments(array: Array, *, axis: int = 1) -> Delayed:
    """Mean and sum of squared deviations of each channel of a dask array: `bnfast.moments`, chunk by chunk.

    Each chunk is read once, and gives a few numbers a channel; they are merged eight at a time, so nothing grows with
    the number of chunks. Any chunks will do; channels may be cut, too.

    Parameters
    ----------
    array : dask.array.Array of float16, bfloat16, float32 or float64, at least 2 dimensions
        Its shape may be unknown but for the channel axis.
    axis : int
        The channel axis.

    Returns
    -------
    dask.delayed.Delayed
        `.compute()` gives a `bnfast.Moments`.

    Raises
    ------
    TypeError
        If it is no dask array, or of another dtype.
    ValueError, numpy.exceptions.AxisError
        If it has fewer than 2 dimensions, or no such axis.

    Notes
    -----
    The result depends on where chunks end, in its last digits, but not on the scheduler, its workers or their order.

    Examples
    --------
    >>> import dask.array as da, bnfast.dask
    >>> bnfast.dask.moments(da.arange(12.0).reshape(6, 2).rechunk((2, 1))).compute().mean
    array([5., 6.])
    """
    if not isinstance(array, Array):
        raise TypeError(f"array: expected a dask.array.Array, got {type(array).__name__}")
    if array.dtype not in (np.float32, np.float64) and not is_half(array.dtype):
        expected = "float16, bfloat16, float32 or float64"
        raise TypeError(f"array: expected dtype {expected}, got {array.dtype}; use array.astype(...)")
    if array.ndim < 2:
        raise ValueError(f"array: expected at least 2 dimensions, got {array.ndim}")
    if not -array.ndim <= axis < array.ndim:
        raise AxisError(axis, array.ndim)
    return reduced(array, axis % array.ndim, _OfChunk(axis % array.ndim), Moments.merge, _side_by_side)


class _OfChunk:
    """Moments of one chunk; a class, so that every scheduler can send it."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, chunk: Any) -> Moments:
        return moments_of_chunk(np.asarray(chunk), axis=self.axis)

    def __dask_tokenize__(self) -> tuple[str, int]:
        return ("bnfast moments", self.axis)


def _side_by_side(parts: list[Moments]) -> Moments:
    """Of neighbouring channels; a part without any has counted nothing."""
    rows = [part.to_row()[1:].reshape(3, -1) for part in parts]
    return Moments.with_rest(max(part.count for part in parts), *np.concatenate(rows, axis=1))


def reduced(
    array: Array,
    axis: int,
    of_chunk: Callable[[Any], Any],
    merge: Callable[[list[Any]], Any],
    side_by_side: Callable[[list[Any]], Any],
) -> Delayed:
    """`of_chunk` of every chunk, merged as a tree over all axes but one, then along that one."""
    name = f"bnfast-moments-{tokenize(array.name, axis, type(of_chunk).__name__, SPLIT)}"
    graph: dict[Any, Any] = {}
    number = iter(range(1 << 62))

    def task(function: Callable[..., Any], argument: Any) -> tuple[str, int]:
        key = (name, next(number))
        graph[key] = (function, argument)
        return key

    ends = []
    for place in range(array.numblocks[axis]):
        keys = [task(of_chunk, (array.name, *index)) for index in _blocks(array.numblocks, axis, place)]
        while len(keys) > 1:
            keys = [task(merge, keys[i : i + SPLIT]) for i in range(0, len(keys), SPLIT)]
        ends += keys
    graph[name] = (side_by_side, ends)
    return Delayed(name, HighLevelGraph.from_collections(name, graph, dependencies=[array]))


def _blocks(numblocks: tuple[int, ...], axis: int, place: int) -> Iterator[tuple[int, ...]]:
    for index in np.ndindex(*numblocks[:axis], 1, *numblocks[axis + 1 :]):
        yield (*index[:axis], place, *index[axis + 1 :])
