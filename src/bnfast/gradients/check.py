"""Gradients, checked along directions.

The derivative of f along u is D_u f = lim (f(x + t*u) - f(x)) / t as t goes to 0. Where f has a gradient, D_u f is
the gradient times u, largest along the gradient itself, and what the product t * D_u f leaves of the increment is o(t).
So a gradient, however long, is checked by a few numbers: the slopes along a few directions, by differences.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .._checks import integer
from .claims import claims_of
from .differences import (
    Array,
    Float64,
    copied,
    eps_of,
    floats,
    order_of_error,
    representable,
    scalar,
    size_of,
    slopes,
    steps_along,
)
from .parts import Part, parts_of
from .verdict import DirectionCheck, GradientCheck

__all__ = ["check_gradient", "check_layer"]

DIRECTIONS = 8
DIRECTIONS_OF_A_PART = 2
RTOL = 1e-6
RATIO = (
    1e3  # of sizes that one direction can tell: a column of 1e-3 of a gradient that is wrong shows as an error of 1e-3
)
COARSEST = 0.1  # tolerance of a part: a wrong sign is an error of 2, a missing term one of 1
ROUNDINGS = 64  # that a small entry of a gradient may owe to the large ones it was added up with


class Layer(Protocol):
    """What `check_layer` asks for; parameters() and gradients(), dicts of arrays with the same keys, may be there."""

    def forward(self, x: Array, /) -> Array: ...
    def backward(self, dy: Array, /) -> Array: ...


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
        f(array like x) gives one number, the same for the same x, or (number, gradient), of which the gradient is left
        aside.
    grad : callable or array_like
        The gradient of f at x, of x's shape; or a function that gives it, or (value, gradient), for x.
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

    Where the entries of a vector, or the slices of an array along an axis, differ in size more than a thousandfold (for
    float32 70-fold), or their gradients do, directions move each in proportion, and those of about one size have 2
    directions of their own: a wrong sign in a column of 1e-8 of a gradient of float64 is found. What of such a part is
    below the rounding of f, or of the rest of the gradient, is "zero".

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([0.5, 1.0, 2.0])
    >>> bnfast.check_gradient(lambda x: np.log(x).sum(), lambda x: 1 / x, x).ok
    True
    """
    data = floats(x, "x")
    directions = integer(directions, "directions")
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}")
    if not (rtol > 0 and math.isfinite(rtol)):
        raise ValueError(f"rtol: expected a positive finite number, got {rtol!r}")
    generator = _generator(rng)
    outputs, eps = scalar(f, data)
    gradient = _gradient(_of_a_pair(grad(copied(data)), data) if callable(grad) else grad, data, "grad")
    checked = _Input("x", data, gradient, outputs)
    rows = _check(checked, np.ones(()), eps, directions, rtol, generator)
    return GradientCheck(getattr(f, "__qualname__", type(f).__name__), tuple(rows))


def check_layer(
    layer: Layer,
    x: ArrayLike,
    *,
    rng: int | np.random.Generator | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> GradientCheck:
    """Check the backward pass of a layer against its forward pass, along directions of x and of each parameter.

    The function is the sum of dy * layer.forward(x), with a random dy. (With dy = 1 much would be seen that is not
    there: the sum of a normalised batch does not depend on x at all.)

    Parameters
    ----------
    layer : object with forward(x) and backward(dy)
        backward(dy) gives dx. If there are methods parameters() and gradients(), which return dicts of arrays with the
        same keys, which forward reads and backward sets, or adds to, those are checked too. Without gradients(),
        backward may give (dx, then the gradients of parameters() in their order). All work is done on copies
        (`copy.deepcopy`): the layer itself, its mode, running statistics, gradients and random numbers, is never
        touched.
    x : array_like of float32 or float64
        float32 is checked in float32, to 1.4e-3 (see `check_gradient`); float64 to 1e-6 and so the better choice
        where the layer takes either.
    rng : None, int or numpy.random.Generator
        Where dy and the random directions come from. None: always the same ones.
    residual, mask : array_like, optional
        Given to forward by these names. With a residual backward gives (dx, dresidual), and that is checked, too.

    Returns
    -------
    GradientCheck
        8 directions for x, for the residual and for each parameter, about 20 forwards each.

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
    Where the columns of an input, or of its gradient, differ in size a thousandfold, those of about one size have 2
    directions of their own, as in `check_gradient`.

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
    data = floats(x, "x")
    given = {} if residual is None else {"residual": floats(residual, "residual")}
    if mask is not None:
        given["mask"] = np.asarray(mask)
    generator = _generator(rng)

    def forward(layer: Any, **changed: Array) -> Any:
        arrays = {"x": data, **given, **changed}
        return layer.forward(copied(arrays.pop("x")), **{name: copied(array) for name, array in arrays.items()})

    work = _copy_of(layer)
    y = _outputs(forward(work))
    if not np.isfinite(y).all():
        raise ValueError("layer: expected finite results of forward, got NaN or Inf")
    dy = generator.standard_normal(y.shape).astype(y.dtype)
    claims = claims_of(work, lambda: forward(work), dy, residual is not None)
    inputs = [_Input("x", data, _gradient(claims.dx, data, "backward's dx"), lambda v: forward(_copy_of(layer), x=v))]
    if residual is not None:
        value, gradient = given["residual"], _gradient(claims.dresidual, given["residual"], "backward's dresidual")
        inputs.append(_Input("residual", value, gradient, lambda v: forward(_copy_of(layer), residual=v)))
    for name, value in claims.parameters.items():
        parameter = np.array(floats(value, f"parameters()[{name!r}]"))
        gradient = _gradient(claims.gradients[name], parameter, f"gradients()[{name!r}]")
        inputs.append(_Input(name, parameter, gradient, _forward_with(layer, forward, name)))

    again = _outputs(inputs[0].outputs(copied(data)))
    eps = eps_of(y)
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
    tolerance = max(rtol, 4 * eps**0.5)
    largest = float(np.abs(checked.gradient).max())
    rounding = ROUNDINGS * eps * largest if math.isfinite(largest) else 0.0
    parts = parts_of(checked.value, checked.gradient, min(RATIO, 0.1 / tolerance), ROUNDINGS * eps)
    return [
        _check_along(checked, part, i, rounding if part.label else 0.0, weights, eps, tolerance, rng)
        for part in parts
        for i in range(DIRECTIONS_OF_A_PART if part.label else directions)
    ]


def _check_along(
    checked: _Input,
    part: Part,
    number: int,
    slack: float,
    weights: Float64,
    eps: float,
    tolerance: float,
    rng: np.random.Generator,
) -> DirectionCheck:
    """The row of a part's first direction, which is along its gradient where there is one, or of a random one.

    `slack`: what rounding may make of an entry of the gradient.
    """
    x, gradient, reach = checked.value, checked.gradient, part.reach
    steepest = gradient * reach * reach  # where an entry's step is its reach
    if number == 0 and 0 < np.linalg.norm(steepest) < math.inf:
        label, u = "gradient", steepest / np.linalg.norm(steepest)
    else:
        label, u = str(number), rng.standard_normal(x.shape) * reach
        u /= np.linalg.norm(u)
    steps = steps_along(x, u, eps, size_of(x[reach == 1]))
    u = representable(x, u, float(steps[-1]))
    found = slopes(checked.outputs, weights, x, u, steps, eps)
    analytic = float(np.vdot(gradient, u))
    scale = max(abs(found.value), abs(analytic), float(np.linalg.norm(gradient * reach) / np.linalg.norm(reach)))
    difference = abs(found.value - analytic)
    slack *= float(np.linalg.norm(u))
    allowed, uncertain, lost = tolerance * scale, found.error + found.rounding, 32 * found.rounding + slack
    if part.label and allowed < 4 * uncertain + slack <= COARSEST * scale:
        tolerance = (4 * uncertain + slack) / scale
        allowed = tolerance * scale
    if not math.isfinite(analytic):
        verdict = "wrong"
    elif found.kink > (allowed if scale > lost else lost):
        verdict = "unresolved" if found.grows else "kink"
    elif scale <= lost:
        verdict = "zero"
    elif not uncertain <= allowed or found.error > max(abs(found.value) / 10, lost):
        verdict = "unresolved"
    elif difference <= allowed:
        verdict = "ok"
    else:
        verdict = "wrong" if difference > allowed + 4 * uncertain else "unresolved"
    error = difference / scale if scale > 0 else difference  # 0, or NaN
    return DirectionCheck(
        checked.name + part.label,
        label,
        found.value,
        analytic,
        math.inf if math.isnan(error) else error,
        order_of_error(found, analytic),
        verdict,
        tolerance,
        "float32" if eps > 1e-10 else "float64",
    )


# --- arguments ---------------------------------------------------------------------------------------------------


def _generator(rng: int | np.random.Generator | None) -> np.random.Generator:
    if isinstance(rng, np.random.Generator):
        return rng
    seed = 0 if rng is None else integer(rng, "rng")
    # not default_rng(seed): x may come from that, and with a dy like x the gradient of batch normalisation is zero
    if seed < 0:
        raise ValueError(f"rng: expected None, an int of at least 0 or a numpy.random.Generator, got {rng!r}")
    return np.random.default_rng((20150211, seed))


def _of_a_pair(found: Any, x: Array) -> Any:
    """Of (value, gradient), which some functions give, the gradient."""
    pair = isinstance(found, tuple) and len(found) == 2 and np.ndim(found[0]) == 0 and np.shape(found[1]) == x.shape
    return found[1] if pair else found


def _gradient(value: Any, x: Array, name: str) -> Float64:
    if value is None or isinstance(value, Mapping):
        raise TypeError(f"{name}: expected an array of shape {x.shape}, got {type(value).__name__}")
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.shape != x.shape:
        raise ValueError(f"{name}: expected shape {x.shape}, got {array.shape}")
    return array.astype(np.float64)


def _outputs(y: Any) -> Array:
    if isinstance(y, tuple):
        raise TypeError(f"layer: expected an array of forward, got a tuple of {len(y)}")
    array = np.asarray(y)
    if array.dtype.kind != "f" or array.size == 0:
        raise TypeError(
            f"layer: expected floating-point numbers of forward, got dtype {array.dtype} of shape {array.shape}"
        )
    return array


def _copy_of(layer: Any) -> Any:
    try:
        copied = copy.deepcopy(layer)
        if hasattr(copied, "comm"):  # on this process alone
            copied.comm = None
        return copied
    except Exception as error:  # whatever an object says to being copied
        raise TypeError(
            f"layer: expected one that copy.deepcopy can copy, got {type(layer).__name__} ({error})"
        ) from error


def _forward_with(layer: Any, forward: Callable[[Any], Any], name: str) -> Callable[[Array], Any]:
    """The forward as a function of one parameter."""

    def with_parameter(value: Array) -> Any:
        work = _copy_of(layer)
        work.parameters()[name][...] = value
        if not np.array_equal(work.parameters()[name], value):
            raise ValueError(f"layer.parameters(): expected the array of {name!r} that the layer uses, got a copy")
        return forward(work)

    return with_parameter
