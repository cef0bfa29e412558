"""Derivatives along directions, by differences.

Differences are central, (f(x + t*u) - f(x - t*u)) / (2*t), with the error of order t**2 removed (Richardson). No step
suits every function: too large a step shows the curvature, too small a one the rounding. So they are taken for steps
from large to small, each a quarter of the one before, and the one with the smallest error, as neighbouring steps show
it, counts (after Ridders, 1982). At a kink (ReLU at 0) f(x + t*u) - 2*f(x) + f(x - t*u) shrinks like t, where f is
smooth like t**2: that tells kinks, from the values of f alone, whatever the gradient says.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Derivative", "directional_derivative"]

Array = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]

RATIO = 4  # of a step to the next


class Derivative(NamedTuple):
    """A derivative along a direction: `value`, and an estimate of its absolute `error`."""

    value: float
    error: float

    def __float__(self) -> float:
        return self.value


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
    data = floats(x, "x")
    direction = np.asarray(u, dtype=np.float64)
    if direction.shape != data.shape:
        raise ValueError(f"u: expected shape {data.shape}, that of x, got {direction.shape}")
    if not np.isfinite(direction).all() or not direction.any():
        raise ValueError("u: expected a direction, got zeros, NaN or Inf")
    outputs, eps = scalar(f, data)
    if step is None:
        steps = steps_along(data, direction, eps)
    else:
        if not (step > 0 and math.isfinite(step)):
            raise ValueError(f"step: expected a positive finite number, got {step!r}")
        steps = np.array([step, step / RATIO, step / RATIO**2])
        if np.array_equal(_moved(data, direction, float(steps[-1])), data):
            raise ValueError(f"step: expected a step that moves x, got {step!r}")
    found = slopes(outputs, np.ones(()), data, direction, steps, eps)
    return Derivative(found.value, max(found.error + found.rounding, found.kink / 2))


# --- the differences ------------------------------------------------------------------------------------------------


class Slopes(NamedTuple):
    """What differences along a direction say."""

    value: float  # the slope
    error: float  # its estimated error
    rounding: float  # the part of the error that rounding of correct outputs explains
    kink: float  # how much the slopes to both sides differ however small the step, 0 where f is smooth
    grows: bool  # and more so for smaller steps, as noise does
    steps: Float64
    rises: Float64  # f(x + t*u) - f(x) for each step
    jitter: float  # of a rise, from rounding or as the smallest steps show it


def slopes(
    outputs: Callable[[Array], Any], weights: Float64, x: Array, u: Float64, steps: Float64, eps: float
) -> Slopes:
    """Slope of f = sum(weights * outputs) at x along u, from differences with each of the steps."""
    n = len(steps)
    rises, central, kinks = np.empty(n), np.empty(n), np.zeros(n)
    with np.errstate(all="ignore"):
        at = np.asarray(outputs(copied(x)), np.float64)
        moved = np.zeros(at.shape, np.bool_)
        previous = np.full_like(at, np.inf)
        for k, t in enumerate(steps):
            above, below = (np.asarray(outputs(_moved(x, u, side)), np.float64) for side in (t, -t))
            # noise of each weighted output: its own rounding, and that of intermediate results where it moves
            moved |= (above != at) | (below != at)
            typical = float(np.sqrt(np.mean(np.square(at[moved] if moved.any() else at))))
            noise = eps * np.abs(weights) * (np.abs(at) + np.where(moved | ~moved.any(), typical, 0.0))
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
    return Slopes(
        value=float(better[best + 1]),
        error=float(error[best]),
        rounding=float(rounding[best + 2]),
        kink=float(max([kinks[best + 2], *later])),
        grows=bool(kinks[best + 2] > 2 * kinks[best + 1] > 0),
        steps=steps,
        rises=rises,
        jitter=max(total, float(error[-1] * steps[-1])),
    )


def order_of_error(found: Slopes, slope: float) -> float:
    """Order of the error of the increment, at the smallest steps where it is more than noise."""
    with np.errstate(all="ignore"):
        errors = np.abs(found.rises - found.steps * slope)
    for k in range(len(errors) - 1, 0, -1):
        if errors[k] > 32 * found.jitter and np.isfinite(errors[k - 1]):
            return float(math.log(errors[k - 1] / errors[k], RATIO)) if errors[k - 1] > 0 else math.nan
    return math.inf if np.isfinite(errors).any() else math.nan


def steps_along(x: Array, u: Float64, eps: float, size: float | None = None) -> Float64:
    """Steps t from large to small, each a power of two: t * max(abs(u)) from eps**(1/8) to eps**(1/2), relative to x.

    Nobody knows the scale on which f changes: it may be the size of x, or 1 (x is an exponent, or a parameter of 0).
    So they start from the larger of the two and end at the smaller, as long as x still moves. `size` is that of x if
    None.
    """
    size = (size_of(x) if size is None else size) or 1.0
    largest = eps**0.125 * max(size, 1.0)
    smallest = max(eps**0.5 * min(size, 1.0), 16 * eps_of(x) * size)
    n = max(4, math.ceil(math.log(largest / smallest, RATIO)) + 1)
    last = 2.0 ** math.floor(math.log2(smallest / float(np.abs(u).max())))
    return last * float(RATIO) ** np.arange(n - 1, -1, -1, dtype=np.float64)


def representable(x: Array, u: Float64, step: float) -> Float64:
    """u, rounded so that x + step*u and x - step*u are exact in x's dtype."""
    moves = step * u
    # 4: exact though the sum be in a larger binade than x
    grid = 4 * np.spacing(np.maximum(np.abs(x), np.abs(moves).astype(x.dtype))).astype(np.float64)
    rounded: Float64 = np.rint(moves / grid) * grid / step
    return rounded


def size_of(x: Array) -> float:
    """Root mean square, without overflow; 0 for what is so small that a part of it cannot be told from 0."""
    largest = float(np.abs(x).max())
    if largest < np.finfo(x.dtype).tiny / eps_of(x):
        return 0.0
    return largest and largest * float(np.sqrt(np.mean(np.square(x / largest, dtype=np.float64))))


def _moved(x: Array, u: Float64, t: float) -> Array:
    """x + t*u in x's dtype and memory order, a new array."""
    moved = np.empty_like(x, subok=False)
    moved[...] = x + t * u
    return moved


# --- arguments ---------------------------------------------------------------------------------------------------


def floats(value: ArrayLike, name: str) -> Array:
    array = np.asarray(value)
    if array.dtype.newbyteorder("=") not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"{name}: expected an array of float32 or float64, got dtype {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one value, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got NaN or Inf")
    return array


def copied(array: Array) -> Array:
    return np.array(array, order="K")


def eps_of(array: Array) -> float:
    return float(np.finfo(array.dtype).eps)


def scalar(f: Callable[[Array], float], x: Array) -> tuple[Callable[[Array], Any], float]:
    """f, checked at x, and the eps of its value; of (value, gradient), which some functions give, the value."""
    found: Any = f(copied(x))
    pair = isinstance(found, tuple) and len(found) == 2 and np.ndim(found[0]) == 0 and np.shape(found[1]) == x.shape
    if isinstance(found, tuple) and not pair:
        raise TypeError(f"f: expected a real number, or (value, gradient), got a tuple of {len(found)}")
    if found is None:
        raise TypeError("f: expected a real number, got None (is there a return?)")
    value = np.asarray(found[0] if pair else found)
    if value.size != 1 or value.dtype.kind not in "fiu":
        raise TypeError(f"f: expected a real number, got dtype {value.dtype} of shape {value.shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"f: expected a finite number at x, got {value.item()}")
    eps = max(eps_of(x), eps_of(value) if value.dtype.kind == "f" else 0.0)

    def outputs(moved: Array) -> Any:
        again: Any = f(moved)
        return np.asarray(again[0] if pair else again).reshape(())

    return outputs, eps
