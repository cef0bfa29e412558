"""How far running statistics are from exact ones."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .._table import html_table, text_table

__all__ = ["StatisticsReport"]

Statistics = NDArray[np.float64]
SHOWN = 5  # channels in the table, the worst ones


@dataclass(frozen=True, eq=False, repr=False)
class StatisticsReport:
    """Running statistics against exact ones, channel by channel; prints as a short table of the worst channels.

    std is sqrt(var + eps), what eval mode divides by, so a channel that is constant makes no trouble.

    Parameters
    ----------
    mean_error : (C,) float64 ndarray, read-only
        Running mean less exact mean, in units of the exact std.
    std_ratio : (C,) float64 ndarray, read-only
        Running std over exact std.

    Attributes
    ----------
    worst_channel : int
        Where abs(mean_error) or abs(log(std_ratio)) is largest; the first with NaN, if there is one.

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast.statistics.report import StatisticsReport
    >>> one, four = np.ones(2), np.full(2, 4.0)
    >>> print(StatisticsReport.compare(one, four, np.array([1.0, 2.0]), four, eps=1e-5))
    running statistics of 2 channels: mean off by up to 0.5 std, std 1 to 1 times the exact one
    channel  mean error / std  std ratio
          1              -0.5          1
          0                 0          1
    """

    mean_error: Statistics
    std_ratio: Statistics

    @classmethod
    def compare(
        cls, mean: Statistics, var: Statistics, exact_mean: Statistics, exact_var: Statistics, eps: float
    ) -> Self:
        """The report on a running mean and variance."""
        with np.errstate(all="ignore"):
            std = np.sqrt(exact_var + eps)
            arrays = (mean - exact_mean) / std, np.sqrt(var + eps) / std
        for array in arrays:
            array.flags.writeable = False
        return cls(*arrays)

    @property
    def worst_channel(self) -> int:
        """The channel that is furthest off."""
        return int(self._worst_first()[0])

    def _worst_first(self) -> NDArray[np.intp]:
        with np.errstate(all="ignore"):
            off = np.maximum(np.abs(self.mean_error), np.abs(np.log(self.std_ratio)))
        return np.argsort(-np.where(np.isnan(off), np.inf, off), kind="stable")

    @property
    def summary(self) -> str:
        """The largest deviations, in one line."""
        low, high = self.std_ratio.min(), self.std_ratio.max()
        return (
            f"running statistics of {len(self.mean_error)} channels: mean off by up to "
            f"{np.abs(self.mean_error).max():.3g} std, std {low:.3g} to {high:.3g} times the exact one"
        )

    def _cells(self) -> list[list[str]]:
        return [[str(i), f"{self.mean_error[i]:.3g}", f"{self.std_ratio[i]:.3g}"] for i in self._worst_first()[:SHOWN]]

    def __str__(self) -> str:
        return f"{self.summary}\n{text_table(_HEADINGS, self._cells())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.summary, _HEADINGS, self._cells())


_HEADINGS = ("channel", "mean error / std", "std ratio")
