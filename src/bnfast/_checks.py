"""Checks of arguments that several modules share."""

import operator
from typing import SupportsIndex

import numpy as np

__all__ = ["flag", "integer"]


def flag(value: bool, name: str) -> bool:
    """The value, Python's or NumPy's, as a bool; TypeError, which names the argument, for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {value!r:.80}")
    return bool(value)


def integer(value: SupportsIndex, name: str) -> int:
    """The value as an int; TypeError, which names the argument, for anything else and for a bool."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
