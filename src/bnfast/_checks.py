"""Checks of arguments that several modules share."""

import operator
from typing import SupportsIndex

__all__ = ["integer"]


def integer(value: SupportsIndex, name: str) -> int:
    """The value as an int; TypeError, which names the argument, for anything else and for a bool."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
