"""Gradients, checked along directions.

The derivative of f along u is D_u f = lim (f(x + t*u) - f(x)) / t as t goes to 0. Where f has a gradient, D_u f is
the gradient times u, largest along the gradient itself, and what the product t * D_u f leaves of the increment is o(t).
So a gradient, however long, is checked by a few numbers: the slopes along a few directions, by differences.

Differences are central, (f(x + t*u) - f(x - t*u)) / (2*t), with the error of order t**2 removed (Richardson). No step
suits every function: too large a step shows the curvature, too small a one the rounding. So they are taken for steps
from large to small, each a quarter of the one before, and the one with the smallest error, as neighbouring steps show
it, counts (after Ridders, 1982). At a kink (ReLU at 0) f(x + t*u) - 2*f(x) + f(x - t*u) shrinks like t, where f is
smooth like t**2: that tells kinks, from the values of f alone, whatever the gradient says.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import integer
from .._table import html_table, text_table

__all__ = ["Derivative", "DirectionCheck", "GradientCheck", "check_gradient", "check_layer", "directional_derivative"]

Array = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]

RATIO = 4  # of a step to the next
DIRECTIONS = 8
RTOL = 1e-6


class Layer(Protocol):
    """What `check_layer` asks for; parameters() and gradients(), dicts of arrays with the same keys, may be there."""

    def forward(self, x: Array, /) -> Array: ...
    def backward(self, dy: Array, /) -> Array: ...


class Derivative(NamedTuple):
    """A derivative along a direction: `value`, and an estimate of its absolute `error`."""

    value: float
    error: float

    def __float__(self) -> float:
        return self.value


class DirectionCheck(NamedTuple):
    """One line of a `GradientCheck`.

    Attributes
    ----------
    input : str
        What was moved, "x" or the name of a parameter.
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
        Of the relative error.
    """

    input: str
    direction: str
    numeric: float
    analytic: float
    relative_error: float
    order: float
    verdict: str
    tolerance: float


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
                why = [f"{kinks} cross a kink (move {name} away from it, or use float64)"] if kinks else []
                why += [f"{unresolved} do not settle (use float64, fewer values or a smoother f)"] if unresolved else []
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


def directional_derivative(
    f: Callable[[Array], float], x: ArrayLike, u: ArrayLike, *, step: float | None = None
) -> Derivative:
    """Derivative of a scalar function along a direction: the slope of f(x + t*u) in t, at 0.

    Parameters
    ----------
    f : callable
        f(array like x) gives one number.
    x : array_like of float32 or float64, of any shape
    u : array_like of x's shape
        The direction. A unit vector, (cos(a), sin(a)) in the plane, gives the slope for each unit of length; the
        derivative is proportional to the length of u.
    step : float, optional
        Three steps are taken, t = step, step/4 and step/16. None: as many as it takes to find good ones.

    Returns
    -------
    Derivative
        `value` and `error`, an estimate of the absolute error. At a kink, where the slopes to both sides differ, the
        value is their mean and the error half of their difference. float() gives the value.

    Raises
    ------
    TypeError
        If `x` is not float32 or float64, or `f` does not give a number.
    ValueError
        If `u` has another shape than `x`, is zero or not finite, `x` is empty, `f(x)` is not finite, or `step` is not
        positive and finite or too small to move `x`.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> value, error = bnfast.directional_derivative(np.prod, [2.0, 3.0], [0.6, 0.8])
    >>> round(value, 9), error < 1e-9  # f_x * cos + f_y * sin = 3 * 0.6 + 2 * 0.8
    (3.4, True)
    """
    data = _data(x, "x")
    direction = np.asarray(u, dtype=np.float64)
    if direction.shape != data.shape:
        raise ValueError(f"u: expected shape {data.shape}, that of x, got {direction.shape}")
    if not np.isfinite(direction).all() or not direction.any():
        raise ValueError("u: expected a direction, got zeros, NaN or Inf")
    outputs, eps = _scalar(f, data)
    if step is None:
        steps = _steps(data, direction, eps)
    else:
        if not (step > 0 and math.isfinite(step)):
            raise ValueError(f"step: expected a positive finite number, got {step!r}")
        steps = np.array([step, step / RATIO, step / RATIO**2])
        if np.array_equal(_moved(data, direction, float(steps[-1])), data):
            raise ValueError(f"step: expected a step that moves x, got {step!r}")
    found = _slopes(outputs, np.ones(()), data, direction, steps, eps)
    return Derivative(found.value, max(found.error + found.rounding, found.kink / 2))


def check_gradient(
    f: Callable[[Array], float],
    grad: Callable[[Array], ArrayLike] | ArrayLike,
    x: ArrayLike,
    *,
    directions: int = DIRECTIONS,
    rtol: float = RTOL,
    rng: int | np.random.Generator | None = None,
) -> GradientCheck:
    """Check the gradient of a scalar function against differences along directions.

    Parameters
    ----------
    f : callable
        f(array like x) gives one number, the same for the same x.
    grad : callable or array_like
        The gradient of f at x, of x's shape; or a function that gives it for x.
    x : array_like of float32 or float64, of any shape
        f is called with arrays of this dtype.
    directions : int
        How many: the first along the gradient, the others random, all of them unit vectors (to rounding: x moved by
        the smallest step is exact).
    rtol : float
        Tolerance of the relative error. It is raised to 4*sqrt(eps) of the dtype of x or of f's value, whichever is
        coarser, which is 1.4e-3 for float32: better than that differences do not know.
    rng : None, int or numpy.random.Generator
        Where random directions come from. None: always the same ones.

    Returns
    -------
    GradientCheck

    Raises
    ------
    TypeError, ValueError
        As `directional_derivative`; also if the gradient has another shape than `x`, or `directions` or `rtol` is not
        positive.

    Notes
    -----
    20 to 45 evaluations of f for each direction. Steps are powers of 4 times a power of 2, from eps**(1/8) times the
    larger of the size of x and 1 down to eps**(1/2) times the smaller of them.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([0.5, 1.0, 2.0])
    >>> bnfast.check_gradient(lambda x: np.log(x).sum(), lambda x: 1 / x, x).ok
    True
    """
    data = _data(x, "x")
    directions = integer(directions, "directions")
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}")
    if not (rtol > 0 and math.isfinite(rtol)):
        raise ValueError(f"rtol: expected a positive finite number, got {rtol!r}")
    generator = _generator(rng)
    outputs, eps = _scalar(f, data)
    gradient = _gradient(grad(_copy(data)) if callable(grad) else grad, data, "grad")
    checked = _Input("x", data, gradient, outputs)
    rows = _check(checked, np.ones(()), eps, directions, rtol, generator)
    return GradientCheck(getattr(f, "__qualname__", type(f).__name__), tuple(rows))


def check_layer(layer: Layer, x: ArrayLike, *, rng: int | np.random.Generator | None = None) -> GradientCheck:
    """Check the backward pass of a layer against its forward pass, along directions of x and of each parameter.

    The function is the sum of dy * layer.forward(x), with a random dy. (With dy = 1 much would be seen that is not
    there: the sum of a normalised batch does not depend on x at all.)

    Parameters
    ----------
    layer : object with forward(x) and backward(dy)
        backward(dy) gives dx. If there are methods parameters() and gradients(), which return dicts of arrays with the
        same keys, which forward reads and backward sets, those are checked too. All work is done on copies
        (`copy.deepcopy`): the layer itself, its mode, running statistics, gradients and random numbers, is never
        touched.
    x : array_like of float32 or float64
        float32 is checked in float32, to 1.4e-3 (see `check_gradient`); float64 to 1e-6 and so the better choice
        where the layer takes either.
    rng : None, int or numpy.random.Generator
        Where dy and the random directions come from. None: always the same ones.

    Returns
    -------
    GradientCheck
        8 directions for x and for each parameter, about 20 forwards each.

    Raises
    ------
    TypeError
        If the layer has no forward or backward, or only one of parameters and gradients, or cannot be copied, or
        something is not an array of floating-point numbers.
    ValueError
        If a gradient is missing, is of no parameter or has a wrong shape, a forward's results are not finite, or differ
        for the same x.

    Notes
    -----
    What it takes for a bug to be seen: an effect on the gradient of more than the tolerance. Planted in batch
    normalisation of 6 rows in float64, statistics taken for constants show as a relative error of 1, a missing term as
    0.6 to 1, M - 1 for M as 0.5; the last falls like M**-1.5 (4e-3 for 64 rows, 1e-4 for 1000), so use small batches.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bn = bnfast.BatchNorm(3)
    >>> check = bnfast.check_layer(bn, np.random.default_rng(0).normal(5.0, 2.0, (8, 3)))
    >>> check.ok, bn.num_batches_tracked
    (True, 0)
    """
    if isinstance(layer, type):
        raise TypeError(f"layer: expected an object with forward and backward, got the class {layer.__name__}")
    for method in ("forward", "backward"):
        if not callable(getattr(layer, method, None)):
            raise TypeError(f"layer: expected an object with forward and backward, got {type(layer).__name__}")
    data = _data(x, "x")
    generator = _generator(rng)

    work = _copied(layer)
    y = _outputs(work.forward(_copy(data)))
    if not np.isfinite(y).all():
        raise ValueError("layer: expected finite results of forward, got NaN or Inf")
    dy = generator.standard_normal(y.shape).astype(y.dtype)
    gradient = _gradient(work.backward(dy.copy()), data, "backward's dx")
    inputs = [_Input("x", data, gradient, lambda moved: _copied(layer).forward(moved))]
    if any(getattr(work, method, None) is not None for method in ("parameters", "gradients")):
        parameters, gradients = _dictionary(work, "parameters"), _dictionary(work, "gradients")
        if parameters.keys() != gradients.keys():
            raise ValueError(
                f"layer.gradients(): expected the keys of parameters(), {list(parameters)}, got {list(gradients)}"
            )
        for name, value in parameters.items():
            parameter = np.array(_data(value, f"parameters()[{name!r}]"))
            gradient = _gradient(gradients[name], parameter, f"gradients()[{name!r}]")
            inputs.append(_Input(name, parameter, gradient, _forward_with(layer, data, name)))

    again = _outputs(inputs[0].outputs(_copy(data)))
    eps = _eps(y)
    if not np.allclose(again, y, rtol=4 * eps**0.5, atol=4 * eps**0.5 * float(np.abs(y).max(initial=0))):
        raise ValueError(
            "layer: expected the same results for the same x, got different ones (give a random layer a Generator)"
        )
    weights = dy.astype(np.float64)
    rows = [row for checked in inputs for row in _check(checked, weights, eps, DIRECTIONS, RTOL, generator)]
    return GradientCheck(type(layer).__name__, tuple(rows))


# --- one input: slopes along directions against the gradient ---------------------------------------------------


class _Input(NamedTuple):
    """An array that outputs depend on, and the gradient that is claimed for it."""

    name: str
    value: Array
    gradient: Float64
    outputs: Callable[[Array], Any]  # of an array like value


def _check(
    checked: _Input, weights: Float64, eps: float, directions: int, rtol: float, rng: np.random.Generator
) -> list[DirectionCheck]:
    """A row for each direction; f is the sum of weights * outputs."""
    x, gradient = checked.value, checked.gradient
    tolerance = max(rtol, 4 * eps**0.5)
    norm = float(np.linalg.norm(gradient))
    rows = []
    for i in range(directions):
        if i == 0 and 0 < norm < math.inf:
            label, u = "gradient", gradient / norm
        else:
            label, u = str(i), rng.standard_normal(x.shape)
            u /= np.linalg.norm(u)
        steps = _steps(x, u, eps)
        u = _representable(x, u, float(steps[-1]))
        found = _slopes(checked.outputs, weights, x, u, steps, eps)
        analytic = float(np.vdot(gradient, u))
        scale = max(abs(found.value), abs(analytic), norm / x.size**0.5)
        difference = abs(found.value - analytic)
        allowed, uncertain, lost = tolerance * scale, found.error + found.rounding, 32 * found.rounding
        if not math.isfinite(analytic):
            verdict = "wrong"
        elif found.kink > (allowed if scale > lost else lost):
            verdict = "unresolved" if found.grows else "kink"
        elif scale <= lost and lost > 0:
            verdict = "zero"
        elif not uncertain <= allowed or found.error > max(abs(found.value) / 10, lost):
            verdict = "unresolved"
        elif difference <= allowed:
            verdict = "ok"
        else:
            verdict = "wrong" if difference > allowed + 4 * uncertain else "unresolved"
        order = _order(found, analytic)
        error = difference / scale if scale > 0 else difference  # 0, or NaN
        rows.append(
            DirectionCheck(
                checked.name,
                label,
                found.value,
                analytic,
                math.inf if math.isnan(error) else error,
                order,
                verdict,
                tolerance,
            )
        )
    return rows


class _Slopes(NamedTuple):
    """What differences along a direction say."""

    value: float  # the slope
    error: float  # its estimated error
    rounding: float  # the part of the error that rounding of correct outputs explains
    kink: float  # how much the slopes to both sides differ however small the step, 0 where f is smooth
    grows: bool  # and more so for smaller steps, as noise does
    steps: Float64
    rises: Float64  # f(x + t*u) - f(x) for each step
    jitter: float  # of a rise, from rounding or as the smallest steps show it


def _slopes(
    outputs: Callable[[Array], Any], weights: Float64, x: Array, u: Float64, steps: Float64, eps: float
) -> _Slopes:
    """Slope of f = sum(weights * outputs) at x along u, from differences with each of the steps."""
    n = len(steps)
    rises, central, kinks = np.empty(n), np.empty(n), np.zeros(n)
    with np.errstate(all="ignore"):
        at = np.asarray(outputs(_copy(x)), np.float64)
        typical = float(np.sqrt(np.mean(at * at)))
        noise = eps * np.abs(weights) * (np.abs(at) + typical)  # of each weighted output
        previous = np.full_like(at, np.inf)
        for k, t in enumerate(steps):
            above, below = (np.asarray(outputs(_moved(x, u, side)), np.float64) for side in (t, -t))
            rises[k] = np.sum(weights * (above - at))
            central[k] = np.sum(weights * (above - below)) / (2 * t)
            bend = np.abs(weights * (above - 2 * at + below)) / t  # smooth: proportional to t
            stays = (bend > previous / RATIO**0.5) & (bend > 8 * noise / t)
            kinks[k] = np.linalg.norm(bend[stays])
            previous = bend
        total = float(np.linalg.norm(noise))
        rounding = total / steps
        # Richardson; the error not as small as for smooth f, but as what the coarser step shows: a kink just inside of
        # the smaller step changes the quotient by less than that, or else its bend stays
        better = central[1:] + (central[1:] - central[:-1]) / (RATIO**2 - 1)
        error = np.maximum(np.abs(better[1:] - better[:-1]), np.abs(central[2:] - central[1:-1]))
        error[~np.isfinite(error)] = np.inf
        for k in range(len(error) - 2, -1, -1):  # noise seen at a smaller step is there at this one, in proportion
            if math.isfinite(error[k + 1]):
                error[k] = max(error[k], error[k + 1] / RATIO)
        best = int(np.argmin(error + rounding[2:]))
        # a small kink may show only at smaller steps, where less of the curvature is left; noise grows fourfold there
        later = [kinks[k] for k in range(best + 3, n) if kinks[k] <= 2 * kinks[k - 1]]
    return _Slopes(
        value=float(better[best + 1]),
        error=float(error[best]),
        rounding=float(rounding[best + 2]),
        kink=float(max([kinks[best + 2], *later])),
        grows=bool(kinks[best + 2] > 2 * kinks[best + 1] > 0),
        steps=steps,
        rises=rises,
        jitter=max(total, float(error[-1] * steps[-1])),
    )


def _order(found: _Slopes, slope: float) -> float:
    """Order of the error of the increment, at the smallest steps where it is more than noise."""
    with np.errstate(all="ignore"):
        errors = np.abs(found.rises - found.steps * slope)
    for k in range(len(errors) - 1, 0, -1):
        if errors[k] > 32 * found.jitter and np.isfinite(errors[k - 1]):
            return float(math.log(errors[k - 1] / errors[k], RATIO)) if errors[k - 1] > 0 else math.nan
    return math.inf if np.isfinite(errors).any() else math.nan


def _steps(x: Array, u: Float64, eps: float) -> Float64:
    """Steps t from large to small, each a power of two: t * max(abs(u)) from eps**(1/8) to eps**(1/2), relative to x.

    Nobody knows the scale on which f changes: it may be the size of x, or 1 (x is an exponent, or a parameter of 0).
    So they start from the larger of the two and end at the smaller, as long as x still moves.
    """
    size = _size(x) or 1.0
    largest = eps**0.125 * max(size, 1.0)
    smallest = max(eps**0.5 * min(size, 1.0), 16 * _eps(x) * size)
    n = max(4, math.ceil(math.log(largest / smallest, RATIO)) + 1)
    last = 2.0 ** math.floor(math.log2(smallest / float(np.abs(u).max())))
    return last * float(RATIO) ** np.arange(n - 1, -1, -1, dtype=np.float64)


def _representable(x: Array, u: Float64, step: float) -> Float64:
    """u, rounded so that x + step*u and x - step*u are exact in x's dtype."""
    moves = step * u
    # 4: exact though the sum be in a larger binade than x
    grid = 4 * np.spacing(np.maximum(np.abs(x), np.abs(moves).astype(x.dtype))).astype(np.float64)
    rounded: Float64 = np.rint(moves / grid) * grid / step
    return rounded


def _size(x: Array) -> float:
    """Root mean square, without overflow."""
    largest = float(np.abs(x).max())
    return largest and largest * float(np.sqrt(np.mean(np.square(x / largest, dtype=np.float64))))


def _moved(x: Array, u: Float64, t: float) -> Array:
    """x + t*u in x's dtype and memory order, a new array."""
    moved = np.empty_like(x, subok=False)
    moved[...] = x + t * u
    return moved


# --- arguments ---------------------------------------------------------------------------------------------------


def _data(value: ArrayLike, name: str) -> Array:
    array = np.asarray(value)
    if array.dtype.newbyteorder("=") not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"{name}: expected an array of float32 or float64, got dtype {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one value, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got NaN or Inf")
    return array


def _copy(array: Array) -> Array:
    return np.array(array, order="K")


def _eps(array: Array) -> float:
    return float(np.finfo(array.dtype).eps)


def _generator(rng: int | np.random.Generator | None) -> np.random.Generator:
    if isinstance(rng, np.random.Generator):
        return rng
    seed = 0 if rng is None else integer(rng, "rng")
    # not default_rng(seed): x may come from that, and with a dy like x the gradient of batch normalisation is zero
    if seed < 0:
        raise ValueError(f"rng: expected None, an int of at least 0 or a numpy.random.Generator, got {rng!r}")
    return np.random.default_rng((20150211, seed))


def _gradient(value: Any, x: Array, name: str) -> Float64:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.shape != x.shape:
        raise ValueError(f"{name}: expected shape {x.shape}, got {array.shape}")
    return array.astype(np.float64)


def _scalar(f: Callable[[Array], float], x: Array) -> tuple[Callable[[Array], Any], float]:
    """f, checked at x, and the eps of its value."""
    value = np.asarray(f(_copy(x)))
    if value.size != 1 or value.dtype.kind not in "fiu":
        raise TypeError(f"f: expected a real number, got dtype {value.dtype} of shape {value.shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"f: expected a finite number at x, got {value.item()}")
    eps = max(_eps(x), _eps(value) if value.dtype.kind == "f" else 0.0)
    return lambda moved: np.asarray(f(moved)).reshape(()), eps


def _outputs(y: Any) -> Array:
    if isinstance(y, tuple):
        raise TypeError(f"layer: expected an array of forward, got a tuple of {len(y)}")
    array = np.asarray(y)
    if array.dtype.kind != "f" or array.size == 0:
        raise TypeError(
            f"layer: expected floating-point numbers of forward, got dtype {array.dtype} of shape {array.shape}"
        )
    return array


def _copied(layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception as error:  # whatever an object says to being copied
        raise TypeError(
            f"layer: expected one that copy.deepcopy can copy, got {type(layer).__name__} ({error})"
        ) from error


def _dictionary(layer: Any, method: str) -> Mapping[str, Array]:
    function = getattr(layer, method, None)
    if not callable(function):
        found = "missing" if function is None else f"an attribute, {type(function).__name__}"
        raise TypeError(f"layer: expected the methods parameters and gradients, or neither; {method} is {found}")
    found = function()
    if not isinstance(found, Mapping):
        raise TypeError(f"layer.{method}(): expected a dict of arrays, got {type(found).__name__}")
    return found


def _forward_with(layer: Any, x: Array, name: str) -> Callable[[Array], Any]:
    """The forward of x as a function of one parameter."""

    def forward(value: Array) -> Any:
        work = _copied(layer)
        work.parameters()[name][...] = value
        if not np.array_equal(work.parameters()[name], value):
            raise ValueError(f"layer.parameters(): expected the array of {name!r} that the layer uses, got a copy")
        return work.forward(_copy(x))

    return forward
