"""What a check of gradients found."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from .._table import html_table, text_table

__all__ = ["DirectionCheck", "GradientCheck"]


class DirectionCheck(NamedTuple):
    """One line of a `GradientCheck`.

    Attributes
    ----------
    input : str
        What was moved: "x", the name of a parameter, or a part of them, "x[:, 3]", whose entries or gradients are far
        smaller than the others.
    direction : str
        "gradient" (along the analytic one) or the number of a random one.
    numeric, analytic : float
        The slope by differences, and the gradient times the direction.
    relative_error : float
        Their difference in units of the largest of the two and the root mean square of the gradient (the slope to be
        expected along a random direction).
    order : float
        Observed order of the error of the increment, f(x + t*u) - f(x) - t * analytic: 2 if the gradient is right
        (o(t)), 1 if it is wrong, inf if nothing but rounding is left (f is linear along the direction).
    verdict : str
        "ok"; "wrong"; "zero" (both slopes are too small to be told from the rounding of f: they agree); "kink" (f has
        a kink within the smallest steps) or "unresolved" (the differences do not settle: noise, jumps, very many
        kinks), which say nothing about the gradient.
    tolerance : float
        Of the relative error: wider for a part that the differences do not know so well, but never above 0.1.
    dtype : str
        "float32" or "float64", the coarser of those of the input and the outputs.
    """

    input: str
    direction: str
    numeric: float
    analytic: float
    relative_error: float
    order: float
    verdict: str
    tolerance: float
    dtype: str = "float64"


@dataclass(frozen=True, repr=False)
class GradientCheck:
    """What `check_gradient` and `check_layer` found; prints as a table, in a notebook too. True if it is `ok`.

    Parameters
    ----------
    name : str
        What was checked.
    rows : tuple of DirectionCheck
        One for each input and direction.

    Attributes
    ----------
    verdict : str
        "wrong" if any direction is; else "inconclusive" if for any input fewer than half of its directions could be
        judged, because f has kinks there or is too rough, or if f is constant to rounding altogether; else "ok".
    ok : bool
        Whether the verdict is "ok".
    summary : str
        The verdict in one line.
    table : str
        A line for each direction.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> check = bnfast.check_gradient(lambda x: (x**3).sum(), lambda x: 2 * x**2, np.array([1.0, 2.0]))
    >>> check.verdict
    'wrong'
    >>> print(check.rows[0].direction, round(check.rows[0].relative_error, 3), round(check.rows[0].order, 2))
    gradient 0.333 1.0
    """

    __module__ = "bnfast"

    name: str
    rows: tuple[DirectionCheck, ...]

    @property
    def verdict(self) -> str:
        """ "ok", "wrong" or "inconclusive"."""
        if any(row.verdict == "wrong" for row in self.rows):
            return "wrong"
        return "inconclusive" if self._too_few() else "ok"

    @property
    def ok(self) -> bool:
        """Whether the gradient is right along enough directions, and wrong along none."""
        return self.verdict == "ok"

    def __bool__(self) -> bool:
        return self.ok

    def raise_if_failed(self) -> None:
        """Raise an AssertionError, with the table, unless the verdict is "ok"."""
        if not self.ok:
            raise AssertionError(str(self))

    def _too_few(self) -> str:
        """Why what could be judged is too little; empty if it is enough."""
        reasons = []
        for name in dict.fromkeys(row.input for row in self.rows):
            verdicts = [row.verdict for row in self.rows if row.input == name]
            kinks, unresolved = verdicts.count("kink"), verdicts.count("unresolved")
            usable = len(verdicts) - kinks - unresolved
            if 2 * usable < len(verdicts):
                coarse = any(row.input == name and row.dtype == "float32" for row in self.rows)
                where, what = (", or use float64", "use float64, ") if coarse else ("", "")
                why = [f"{kinks} cross a kink (move {name} away from it{where})"] if kinks else []
                why += [f"{unresolved} do not settle ({what}fewer values or a smoother f)"] if unresolved else []
                reasons.append(f"only {usable} of {len(verdicts)} directions of {name} can be judged: {', '.join(why)}")
        if not reasons and not any(row.verdict in ("ok", "wrong") for row in self.rows):
            reasons.append("along no direction does f change by more than its rounding")
        return "; ".join(reasons)

    @property
    def summary(self) -> str:
        """The verdict and what it rests on."""
        if self.verdict == "inconclusive":
            return f"{self.name}: inconclusive: {self._too_few()}"
        judged = [row for row in self.rows if row.verdict in ("ok", "wrong")]
        zero = sum(row.verdict == "zero" for row in self.rows)
        inputs = ", ".join(dict.fromkeys(row.input for row in self.rows))
        found = f"{self.name}: {self.verdict}: {len(judged)} of {len(self.rows)} directions of {inputs} judged"
        if zero:
            found += f", {zero} zero to rounding"
        if judged:
            worst = max(judged, key=lambda row: (row.verdict == "wrong", row.relative_error / row.tolerance))
            found += (
                f", largest relative error {worst.relative_error:.1e} ({worst.input}, tolerance {worst.tolerance:.1e})"
            )
        return found

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.input,
                row.direction,
                f"{row.numeric:.9g}",
                f"{row.analytic:.9g}",
                f"{row.relative_error:.1e}",
                "exact" if row.order == math.inf else f"{row.order:.2f}",
                row.verdict,
            ]
            for row in self.rows
        ]

    @property
    def table(self) -> str:
        """Input, direction, numeric and analytic slope, relative error, order of the error, verdict."""
        return text_table(_HEADINGS, self._cells())

    def __str__(self) -> str:
        return f"{self.summary}\n{self.table}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.summary, _HEADINGS, self._cells())


_HEADINGS = ("input", "direction", "numeric", "analytic", "relative error", "order", "verdict")
