"""How the axes of data may lie in memory."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How (N, C, ...) is given to bnfast: `place` copies it into this layout, whose channel axis is `axis`."""

    axis: int
    place: Callable[[np.ndarray], np.ndarray]


def channels_last_view(x):
    """(N, C, ...) over memory of (N, ..., C)."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


LAYOUTS = {
    "planar": Layout(1, np.ascontiguousarray),
    "channels_last_view": Layout(1, channels_last_view),
    "fortran": Layout(1, np.asfortranarray),
    "axis_first": Layout(0, lambda x: np.ascontiguousarray(np.moveaxis(x, 1, 0))),
    "axis_last": Layout(-1, lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1))),
}
