"""Data that are not here yet: collections that another module knows how to reduce and map, once that is imported."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from .columns import Statistics

__all__ = ["Lazy", "is_lazy", "known", "register"]


class Lazy(Protocol):
    """What has to be known of a kind of collections."""

    def handles(self, x: object) -> bool: ...

    def statistics(self, x: Any) -> Statistics:
        """Of its features; computed, once."""

    def mapped(self, x: Any, scaled: Callable[[np.ndarray, slice], np.ndarray]) -> Any:
        """The collection of `scaled(block, columns)` for each of its blocks, and of the columns that it has."""


_registered: list[Lazy] = []


def register(kind: Lazy) -> None:
    """From now on the scaler takes collections of this kind."""
    _registered.append(kind)


def is_lazy(x: object) -> bool:
    """Whether x is a collection of dask's."""
    return type(x) is not np.ndarray and any(
        base.__module__.partition(".")[0] in ("dask", "dask_expr") for base in type(x).__mro__
    )


def known(x: object) -> Lazy:
    """What is registered for x; TypeError for what nothing is."""
    for kind in _registered:
        if kind.handles(x):
            return kind
    if not _registered:
        raise TypeError(f"X: got {type(x).__name__}, a collection of dask's: import bnfast.dask first")
    raise TypeError(f"X: expected a dask array or data frame of 2 dimensions, got {type(x).__name__}")
