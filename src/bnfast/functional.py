"""Batch normalisation as functions: arrays in, arrays out, no state.

In all of them `x` has any number of dimensions from 2 up and any memory order; `axis` is the channel axis, of length
C; the statistics are taken over all other axes, M values a channel. Data are float16, bfloat16 (that of ml_dtypes),
float32 or float64, statistics always float64. Halves are computed with in float32, and rounded once, at the end;
parameters, and the gradients of them, are float32 or float64. Results lie in memory as `x` does. With `out=`, the
result is written there and `out` is returned; `out` may be `x` (or `dy`) itself, and may overlap them in any other way
at the price of a temporary array. Inputs are never modified otherwise.

All of them can do in the same pass what comes after batch normalisation in a network: y = activation(batch norm(x) +
residual), where `activation` is None, "relu", "relu6" or "leaky_relu"; and leave out positions, such as the padding of
sequences, by a `mask`. Positions are all axes but the channel's; where the mask is False, x, residual and dy may be
anything, NaN too, nothing of them enters a statistic or a sum, and y, dx and dresidual are 0.

`bnfast.reference` has the same functions in a few lines of NumPy each.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._checks import is_half
from .statistics.sums import Sums

__all__ = [
    "Sums",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_sums",
    "batch_norm_eval",
    "batch_norm_jvp",
]

Array = NDArray[np.floating[Any]]
Activation = Literal["relu", "relu6", "leaky_relu"] | None
Statistics = NDArray[np.float64]


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    return_var: bool = False,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """Normalise each channel over the batch: y = gamma * (x - mean) * inv_std + beta.

    Parameters
    ----------
    x : (..., C, ...) array_like of a floating dtype (see above), at least 2 dimensions
    gamma, beta : (C,) array_like of float32 or float64, or None
        Scale and shift; None: 1 and 0.
    axis : int
        The channel axis.
    eps : float
        Added to the variance, inside the root; positive.
    residual : array_like of x's shape and dtype, optional
        Added before the activation; any strides, those of `numpy.broadcast_to` too.
    activation : None, "relu", "relu6" or "leaky_relu"
        Of y; NaN stays NaN. Its derivative is 0 at 0 (for "relu6" also at 6, for "leaky_relu" `negative_slope` at 0).
    negative_slope : float
        Of "leaky_relu", above 0 and below 1.
    mask : bool array_like, broadcast to x's shape without its channel axis, optional
        Where True, the position takes part.
    return_var : bool
        Whether the variance is handed out, too: 1/inv_std**2 - eps has no digits of a variance much smaller than eps.
    out : ndarray like x, optional
        Where to write y.

    Returns
    -------
    y : ndarray like x
    mean : (C,) float64 ndarray
    inv_std : (C,) float64 ndarray
        1/sqrt(var + eps) with the population variance (divisor M).
    var : (C,) float64 ndarray
        The population variance; only with `return_var`. Infinite where the squares of a channel
        add up to more than float64 holds (1.8e308); y, mean and inv_std are right there.

    Raises
    ------
    TypeError
        If an argument has a wrong type or dtype.
    ValueError
        If a shape is wrong, `eps` is not positive and finite, a channel has fewer than 2 values that take part, `out`
        is read-only or overlaps itself, or there is no such activation.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    Notes
    -----
    Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1. float32: y has the error of four roundings, at most
    2.4e-7 * (abs(gamma) * (1 + abs(x_hat)) + abs(beta)), for a mean up to 1e6 standard deviations from zero, and
    that of the statistics, which averages out but in data made to prevent it (docs/theory/error-bounds.md).

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast import functional as F
    >>> y, mean, inv_std = F.batch_norm(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> mean
    array([ 2., 20.])
    >>> y.round(3)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    at = None if mask is None else _positions(mask, x, axis, training=True)
    if at is None:
        return _core.batch_norm(x, gamma, beta, axis, eps, out, residual, activation, negative_slope, return_var)
    _core.check_out(out, at.model)
    part, residual = at.gather(x, "x"), _there(at, residual, "residual")
    y, *statistics = _core.batch_norm(part, gamma, beta, 1, eps, part, residual, activation, negative_slope, return_var)
    return (at.scatter(y, out), *statistics)


def batch_norm_eval(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each channel with given statistics: y = gamma * (x - mean) / sqrt(var + eps) + beta.

    Parameters
    ----------
    x : (..., C, ...) array_like of a floating dtype (see above), at least 2 dimensions
        May be empty.
    mean, var : (C,) array_like of float32 or float64
        Statistics to normalise with; `var` + `eps` above 0.
    gamma, beta : (C,) array_like of float32 or float64, or None
        Scale and shift; None: 1 and 0.
    axis : int
        The channel axis.
    eps : float
        Added to the variance, inside the root; positive.
    residual : ndarray of x's shape and dtype, optional
        Added before the activation; any strides, those of `numpy.broadcast_to` too.
    activation : None, "relu", "relu6" or "leaky_relu"
        Of y; NaN stays NaN. Its derivative is 0 at 0 (for "relu6" also at 6, for "leaky_relu" `negative_slope` at 0).
    negative_slope : float
        Of "leaky_relu", above 0 and below 1.
    mask : bool array_like, broadcast to x's shape without its channel axis, optional
        Where True, the position takes part.
    out : ndarray like x, optional
        Where to write y.

    Returns
    -------
    y : ndarray like x

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`, but for `eps`, which may be 0; also ValueError if a `var` is not finite, or `var` + `eps` not
        above 0.

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast import functional as F
    >>> F.batch_norm_eval(np.array([[1.0], [5.0]]), mean=[3.0], var=[4.0], eps=1e-12)
    array([[-1.],
           [ 1.]])
    """
    at = None if mask is None else _positions(mask, x, axis)
    if at is None:
        return _core.batch_norm_eval(x, mean, var, gamma, beta, axis, eps, out, residual, activation, negative_slope)
    _core.check_out(out, at.model)
    part, residual = at.gather(x, "x"), _there(at, residual, "residual")
    y = _core.batch_norm_eval(part, mean, var, gamma, beta, 1, eps, part, residual, activation, negative_slope)
    return at.scatter(y, out)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    training: bool = True,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    out: Array | None = None,
    out_residual: Array | None = None,
) -> tuple[Array, ...]:
    """Gradients of a loss through `batch_norm` (training) or `batch_norm_eval` (not training).

    Parameters
    ----------
    dy : ndarray of x's shape and dtype
        Gradient of the loss with respect to y.
    x : (..., C, ...) array_like of a floating dtype (see above)
        What was normalised.
    mean, inv_std : (C,) array_like of float32 or float64
        As `batch_norm` gave them; for eval the running mean and 1/sqrt(running_var + eps).
    gamma, beta : (C,) array_like of float32 or float64, or None
        Scale and shift; None: 1 and 0. Without an activation the shift does not matter.
    axis : int
        The channel axis.
    training : bool
        True: mean and inv_std depend on x, and the gradient flows through them. False: they are constants.
    residual, activation, negative_slope, mask : optional
        What the forward was given. An activation needs `beta`, too.
    out, out_residual : ndarray like x, optional
        Where to write dx and dresidual. One of them may be `dy`.

    Returns
    -------
    dx : ndarray like x
    dgamma, dbeta : (C,) ndarray of x's dtype, or of float32 for halves
    dresidual : ndarray like x
        Only with a residual: its gradient, dy times the derivative of the activation.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`; also if `dy` differs from `x` in shape (ValueError) or dtype (TypeError).

    Notes
    -----
    With x_hat = (x - mean) * inv_std: dbeta = sum(dy), dgamma = sum(dy * x_hat),
    dx = gamma * inv_std * (dy - dbeta/M - x_hat * dgamma/M) in training, gamma * inv_std * dy otherwise
    (Ioffe and Szegedy 2015, section 3, collected by terms). With an activation dy stands for dy times its derivative at
    what the forward had there, which is made again from x (and residual), to the bit.

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast import functional as F
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, inv_std = F.batch_norm(x)
    >>> dx, dgamma, dbeta = F.batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), x, mean, inv_std)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    at = None if mask is None else _positions(mask, x, axis, training)
    if at is None:
        return _core.batch_norm_backward(
            dy, x, mean, inv_std, gamma, axis, training, out, beta, residual, activation, negative_slope, out_residual
        )
    _core.check_outs(out, out_residual, residual, at.model)
    dx, dgamma, dbeta, *dresidual = _core.batch_norm_backward(
        at.gather(dy, "dy"), at.gather(x, "x"), mean, inv_std, gamma, 1, training, None, beta,
        _there(at, residual, "residual"), activation, negative_slope,
    )  # fmt: skip
    return (at.scatter(dx, out), dgamma, dbeta, *(at.scatter(part, out_residual) for part in dresidual))


def batch_norm_backward_sums(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
) -> Sums:
    """The first half of `batch_norm_backward` in training: what it sums over the batch.

    For a batch in parts: sums of the parts, of any size, add up, and `batch_norm_backward_apply` makes of the sums of
    the whole the gradient of each part.

    Parameters
    ----------
    dy, x, mean, inv_std, gamma, beta, axis, residual, activation, negative_slope, mask : see `batch_norm_backward`
        As for `batch_norm_backward`; `mean` and `inv_std` are those of the whole batch.

    Returns
    -------
    Sums
        In float64; dgamma and dbeta are the gradients of gamma and beta.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast import functional as F
    >>> x, dy = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> y, mean, inv_std = F.batch_norm(x)
    >>> sums = sum(F.batch_norm_backward_sums(dy[i : i + 1], x[i : i + 1], mean, inv_std) for i in range(3))
    >>> F.batch_norm_backward_apply(dy[:1], x[:1], mean, inv_std, None, sums).round(4)
    array([[0.1763]])
    """
    at = None if mask is None else _positions(mask, x, axis)
    if at is not None:
        dy, x, residual, axis = at.gather(dy, "dy"), at.gather(x, "x"), _there(at, residual, "residual"), 1
    return Sums(
        *_core.batch_norm_backward_sums(dy, x, mean, inv_std, gamma, axis, beta, residual, activation, negative_slope)
    )


def batch_norm_backward_apply(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None,
    sums: Sums,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    out: Array | None = None,
    out_residual: Array | None = None,
) -> Any:
    """The second half of `batch_norm_backward` in training: dx, given the sums.

    Parameters
    ----------
    dy, x, mean, inv_std, gamma : see `batch_norm_backward`
        Perhaps of a part of the batch, of any size.
    sums : Sums
        Of the whole batch, of at least 2 values a channel.
    beta, axis, residual, activation, negative_slope, mask, out, out_residual : see `batch_norm_backward`

    Returns
    -------
    dx : ndarray like x
        With a residual (dx, dresidual). With `sums` of the same data it has the bits of `batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm_backward`; also if `sums` is no Sums, has another number of channels, or a count below 2.

    Examples
    --------
    A batch in two halves:

    >>> import numpy as np, bnfast
    >>> from bnfast import functional as F
    >>> x, dy = np.array([[1.0], [2.0], [6.0], [3.0]]), np.array([[1.0], [0.0], [0.0], [0.0]])
    >>> m = bnfast.moments(x[:2]) + bnfast.moments(x[2:])
    >>> inv_std = 1 / np.sqrt(m.var() + 1e-5)
    >>> sums = sum(F.batch_norm_backward_sums(dy[half], x[half], m.mean, inv_std) for half in (np.s_[:2], np.s_[2:]))
    >>> F.batch_norm_backward_apply(dy[2:], x[2:], m.mean, inv_std, None, sums).round(4)
    array([[ 0.0954],
           [-0.1336]])
    """
    if not isinstance(sums, Sums):
        raise TypeError(f"sums: expected bnfast.functional.Sums, got {type(sums).__name__}")
    if sums.count < 2:
        raise ValueError(f"sums: expected those of at least 2 values a channel, got a count of {sums.count}")
    at = None if mask is None else _positions(mask, x, axis)
    if at is None:
        return _core.batch_norm_backward_apply(
            dy, x, mean, inv_std, gamma, sums.count, sums.dgamma, sums.dbeta, axis, beta, residual, activation,
            negative_slope, out, out_residual,
        )  # fmt: skip
    _core.check_outs(out, out_residual, residual, at.model)
    found = _core.batch_norm_backward_apply(
        at.gather(dy, "dy"), at.gather(x, "x"), mean, inv_std, gamma, sums.count, sums.dgamma, sums.dbeta, 1, beta,
        _there(at, residual, "residual"), activation, negative_slope, None, None,
    )  # fmt: skip
    if residual is None:
        return at.scatter(found, out)
    return at.scatter(found[0], out), at.scatter(found[1], out_residual)


def batch_norm_jvp(
    v: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    vgamma: ArrayLike | None = None,
    vbeta: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    vresidual: ArrayLike | None = None,
    activation: Activation = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Derivative of `batch_norm`'s y along a direction of x, gamma, beta and residual (forward mode).

    Parameters
    ----------
    v : ndarray of x's shape and dtype
        Direction of x.
    x : (..., C, ...) array_like of a floating dtype (see above)
        What was normalised.
    mean, inv_std : (C,) array_like of float32 or float64
        As `batch_norm` gave them.
    gamma, beta : (C,) array_like of float32 or float64, or None
        Scale and shift; None: 1 and 0. Without an activation the shift does not matter.
    axis : int
        The channel axis.
    vgamma, vbeta : (C,) array_like of float32 or float64, or None
        Directions of gamma and beta; None: 0.
    residual : ndarray of x's shape and dtype, optional
        What the forward was given.
    vresidual : ndarray of x's shape and dtype, optional
        Direction of the residual; None: 0.
    activation, negative_slope, mask : optional
        What the forward was given.
    out : ndarray like x, optional
        Where to write the result.

    Returns
    -------
    ndarray like x
        gamma * inv_std * (v - mean(v) - x_hat * mean(v * x_hat)) + vgamma * x_hat + vbeta + vresidual, times the
        derivative of the activation

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm_backward`.

    Examples
    --------
    A shift of the whole batch changes nothing:

    >>> import numpy as np
    >>> from bnfast import functional as F
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, inv_std = F.batch_norm(x)
    >>> F.batch_norm_jvp(np.ones_like(x), x, mean, inv_std)
    array([[0.],
           [0.],
           [0.]])
    """
    at = None if mask is None else _positions(mask, x, axis, training=True)
    if at is not None:
        _core.check_out(out, at.model)
        along = batch_norm_jvp(
            at.gather(v, "v"), at.gather(x, "x"), mean, inv_std, gamma, beta=beta, vgamma=vgamma, vbeta=vbeta,
            residual=_there(at, residual, "residual"), vresidual=_there(at, vresidual, "vresidual"),
            activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
        return at.scatter(along, out)
    if residual is None and vresidual is None and activation is None:
        return _core.batch_norm_jvp(v, x, mean, inv_std, gamma, axis, vgamma, vbeta, out)
    data = _core.as_data(x, "x")
    _core.check_out(out, data)
    if is_half(data.dtype):  # rounded once, at the end
        given = {"v": v, "residual": residual, "vresidual": vresidual}
        wide = {
            name: _core.widened(_core.as_like(part, name, data)) for name, part in given.items() if part is not None
        }
        along = batch_norm_jvp(
            x=_core.widened(data), mean=mean, inv_std=inv_std, gamma=gamma, beta=beta, axis=axis, vgamma=vgamma,
            vbeta=vbeta, activation=activation, negative_slope=negative_slope, **wide,
        )  # fmt: skip
        return _core.narrowed(along, data, out)
    y = _core.before_activation(data, mean, inv_std, gamma, beta, axis, residual)
    along = _core.batch_norm_jvp(v, data, mean, inv_std, gamma, axis, vgamma, vbeta, None)
    if vresidual is not None:
        along += _core.as_like(vresidual, "vresidual", data)
    return _core.passed_by(along, y, activation, negative_slope, out)


# --- masks ------------------------------------------------------------------------------------------------------


def _positions(mask: ArrayLike, x: ArrayLike, axis: int, training: bool = False) -> _core.Positions | None:
    """Those of x that take part, None: all. In training 2 are needed."""
    positions = _core.positions_of(mask, x, axis)
    if positions.all:
        return None
    if training:
        _core.check_positions(positions.count)
    return positions


def _there(positions: _core.Positions, array: ArrayLike | None, name: str) -> Array | None:
    """What lies at some positions; None stays None."""
    return None if array is None else positions.gather(array, name)
