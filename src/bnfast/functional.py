"""Batch normalisation as functions: arrays in, arrays out, no state.

In all of them `x` has any number of dimensions from 2 up and any memory order; `axis` is the channel axis, of length
C; the statistics are taken over all other axes, M values a channel. Data are float32 or float64, statistics always
float64. Results lie in memory as `x` does. With `out=`, the result is written there and `out` is returned; `out` may
be `x` (or `dy`) itself, and may overlap them in any other way at the price of a temporary array. Inputs are never
modified otherwise.

`bnfast.reference` has the same functions in a few lines of NumPy each.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_eval", "batch_norm_jvp"]

Array = NDArray[np.floating[Any]]
Statistics = NDArray[np.float64]


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """Normalise each channel over the batch: y = gamma * (x - mean) * inv_std + beta.

    Parameters
    ----------
    x : (..., C, ...) array_like of float32 or float64, at least 2 dimensions
    gamma, beta : (C,) array_like of float32 or float64, or None
        Scale and shift; None: 1 and 0.
    axis : int
        The channel axis.
    eps : float
        Added to the variance, inside the root; positive.
    out : ndarray like x, optional
        Where to write y.

    Returns
    -------
    y : ndarray like x
    mean : (C,) float64 ndarray
    inv_std : (C,) float64 ndarray
        1/sqrt(var + eps) with the population variance (divisor M).

    Raises
    ------
    TypeError
        If an argument has a wrong type or dtype.
    ValueError
        If a shape is wrong, `eps` is not positive and finite, a channel has fewer than 2 values, or `out` is
        read-only or overlaps itself.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    Notes
    -----
    Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1. float32: y has the error of four roundings, at most
    2.4e-7 * (abs(gamma) * (1 + abs(x_hat)) + abs(beta)), for a mean up to 1e6 standard deviations from zero, and
    that of the statistics, which averages out but in data made to prevent it (docs/error-bounds.md).

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
    return _core.batch_norm(x, gamma, beta, axis, eps, out)


def batch_norm_eval(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Normalise each channel with given statistics: y = gamma * (x - mean) / sqrt(var + eps) + beta.

    Parameters
    ----------
    x : (..., C, ...) array_like of float32 or float64, at least 2 dimensions
        May be empty.
    mean, var : (C,) array_like of float32 or float64
        Statistics to normalise with; `var` at least 0.
    gamma, beta : (C,) array_like of float32 or float64, or None
        Scale and shift; None: 1 and 0.
    axis : int
        The channel axis.
    eps : float
        Added to the variance, inside the root; positive.
    out : ndarray like x, optional
        Where to write y.

    Returns
    -------
    y : ndarray like x

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`; also ValueError if a `var` is negative or NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from bnfast import functional as F
    >>> F.batch_norm_eval(np.array([[1.0], [5.0]]), mean=[3.0], var=[4.0], eps=1e-12)
    array([[-1.],
           [ 1.]])
    """
    return _core.batch_norm_eval(x, mean, var, gamma, beta, axis, eps, out)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of a loss through `batch_norm` (training) or `batch_norm_eval` (not training).

    Parameters
    ----------
    dy : ndarray of x's shape and dtype
        Gradient of the loss with respect to y.
    x : (..., C, ...) array_like of float32 or float64
        What was normalised.
    mean, inv_std : (C,) array_like of float32 or float64
        As `batch_norm` gave them; for eval the running mean and 1/sqrt(running_var + eps).
    gamma : (C,) array_like of float32 or float64, or None
        Scale; None: 1.
    axis : int
        The channel axis.
    training : bool
        True: mean and inv_std depend on x, and the gradient flows through them. False: they are constants.
    out : ndarray like x, optional
        Where to write dx.

    Returns
    -------
    dx : ndarray like x
    dgamma, dbeta : (C,) ndarray of x's dtype

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`; also if `dy` differs from `x` in shape (ValueError) or dtype (TypeError).

    Notes
    -----
    With x_hat = (x - mean) * inv_std: dbeta = sum(dy), dgamma = sum(dy * x_hat),
    dx = gamma * inv_std * (dy - dbeta/M - x_hat * dgamma/M) in training, gamma * inv_std * dy otherwise
    (Ioffe and Szegedy 2015, section 3, collected by terms).

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
    return _core.batch_norm_backward(dy, x, mean, inv_std, gamma, axis, training, out)


def batch_norm_jvp(
    v: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    vgamma: ArrayLike | None = None,
    vbeta: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Derivative of `batch_norm`'s y along a direction of x, gamma and beta (forward mode).

    Parameters
    ----------
    v : ndarray of x's shape and dtype
        Direction of x.
    x : (..., C, ...) array_like of float32 or float64
        What was normalised.
    mean, inv_std : (C,) array_like of float32 or float64
        As `batch_norm` gave them.
    gamma : (C,) array_like of float32 or float64, or None
        Scale; None: 1.
    axis : int
        The channel axis.
    vgamma, vbeta : (C,) array_like of float32 or float64, or None
        Directions of gamma and beta; None: 0.
    out : ndarray like x, optional
        Where to write the result.

    Returns
    -------
    ndarray like x
        gamma * inv_std * (v - mean(v) - x_hat * mean(v * x_hat)) + vgamma * x_hat + vbeta

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
    return _core.batch_norm_jvp(v, x, mean, inv_std, gamma, axis, vgamma, vbeta, out)
