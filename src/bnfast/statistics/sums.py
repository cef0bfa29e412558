"""Sums of a backward pass, channel by channel: of parts of a batch they add up to those of the whole."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import integer
from .moments import count_of_row, per_channel

__all__ = ["Sums"]


@dataclass(frozen=True, eq=False)
class Sums:
    """What a backward pass sums over the batch: values a channel, sum(dy * x_hat) and sum(dy).

    Immutable. Sums of parts of a batch add up: `a + b`, `sum(list_of_sums)`, and `Sums.merge(parts)`, a tree in the
    order of the parts, whose result does not depend on how they were grouped meanwhile.

    Parameters
    ----------
    count : int
        Values a channel, at least 0.
    dgamma, dbeta : (C,) array_like
        sum(dy * x_hat) and sum(dy) of each channel, which are the gradients of gamma and beta.

    Attributes
    ----------
    count : int
    dgamma, dbeta : (C,) float64 ndarray, read-only

    Raises
    ------
    TypeError
        If `count` is not an int, or the others are not real numbers.
    ValueError
        If `count` is negative, or the shapes differ or are not one-dimensional.

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast import functional as F
    >>> F.Sums(2, [1.0], [3.0]) + F.Sums(4, [0.5], [1.0])
    Sums(count=6, dgamma=array([1.5]), dbeta=array([4.]))
    """

    __module__ = "bnfast.functional"  # where it is found, also by pickles
    __slots__ = ("count", "dbeta", "dgamma")
    count: int
    dgamma: NDArray[np.float64]
    dbeta: NDArray[np.float64]

    def __init__(self, count: int, dgamma: ArrayLike, dbeta: ArrayLike) -> None:
        count = integer(count, "count")
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        gamma, beta = per_channel(dgamma, "dgamma"), per_channel(dbeta, "dbeta")
        if gamma.shape != beta.shape:
            raise ValueError(f"dbeta: expected shape {gamma.shape}, that of dgamma, got {beta.shape}")
        for name, value in (("count", count), ("dgamma", gamma), ("dbeta", beta)):
            object.__setattr__(self, name, value)

    @classmethod
    def merge(cls, parts: Iterable["Sums"]) -> "Sums":
        """The sum of some parts, at least one: a tree in their order."""
        found = list(parts)
        if not found:
            raise ValueError("parts: expected at least one Sums, got none")
        while len(found) > 1:
            pairs = [found[i] + found[i + 1] for i in range(0, len(found) - 1, 2)]
            found = pairs + found[2 * len(pairs) :]
        return found[0]

    def to_row(self) -> NDArray[np.float64]:
        """These as numbers that can be sent: (1 + 2 C,) float64, count, dgamma and dbeta."""
        return np.concatenate([[float(self.count)], self.dgamma, self.dbeta])

    @classmethod
    def from_row(cls, row: ArrayLike) -> "Sums":
        """The sums that `to_row` gave as numbers.

        Raises
        ------
        TypeError, ValueError
            If it is no such row.
        """
        numbers = per_channel(row, "row")
        if numbers.size % 2 != 1:
            raise ValueError(f"row: expected 1 + 2 C numbers, got {numbers.size}")
        count: Any = count_of_row(numbers[0])  # a fraction is refused as any other count is
        return cls(count, *numbers[1:].reshape(2, -1))

    def __add__(self, other: object) -> "Sums":
        if not isinstance(other, Sums):
            return NotImplemented
        if self.dgamma.shape != other.dgamma.shape:
            raise ValueError(f"other: expected {self.dgamma.size} channels, got {other.dgamma.size}")
        return Sums(self.count + other.count, self.dgamma + other.dgamma, self.dbeta + other.dbeta)

    def __radd__(self, other: object) -> "Sums":
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        return NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sums):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.dgamma, other.dgamma, equal_nan=True)
            and np.array_equal(self.dbeta, other.dbeta, equal_nan=True)
        )

    def __hash__(self) -> int:
        return hash((self.count, self.dgamma.shape))  # equal sums may differ in the bits of NaN and of zero

    def __reduce__(self) -> tuple[type["Sums"], tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        return Sums, (self.count, self.dgamma, self.dbeta)
