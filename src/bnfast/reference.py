"""The functions of `bnfast.functional` in NumPy: the same signatures, the formulas as one reads them.

They compute in float64 (in longdouble for longdouble data) and return that, unrounded: the oracle of the tests, and
the shortest description of what the kernels do. They check nothing, and use nothing else of bnfast.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_eval", "batch_norm_jvp", "moments"]

Wide = NDArray[Any]


def _wide(value: ArrayLike) -> Wide:
    array = np.asarray(value)
    return array.astype(np.result_type(array.dtype, np.float64))


def _other_axes(x: Wide, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _along(parameter: ArrayLike | None, x: Wide, axis: int, default: float) -> Wide:
    """A (C,) parameter shaped to broadcast against x."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return _wide(np.full(x.shape[axis], default) if parameter is None else parameter).reshape(shape)


def _written(result: Wide, out: NDArray[Any] | None) -> Wide:
    if out is None:
        return result
    out[...] = result
    return out


def moments(x: ArrayLike, *, axis: int = 1) -> tuple[int, Wide, Wide]:
    """See `bnfast.moments`; here (count, mean, m2)."""
    x = _wide(x)
    count = x.size // max(1, x.shape[axis])
    mean = x.mean(_other_axes(x, axis), keepdims=True) if count else _along(None, x, axis, 0.0)
    return count, mean.ravel(), ((x - mean) ** 2).sum(_other_axes(x, axis))


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
) -> tuple[Wide, Wide, Wide]:
    """See `bnfast.functional.batch_norm`."""
    x = _wide(x)
    mean = x.mean(_other_axes(x, axis), keepdims=True)
    var = ((x - mean) ** 2).mean(_other_axes(x, axis), keepdims=True)
    inv_std = 1 / np.sqrt(var + eps)
    y = _along(gamma, x, axis, 1.0) * ((x - mean) * inv_std) + _along(beta, x, axis, 0.0)
    return _written(y, out), mean.ravel(), inv_std.ravel()


def batch_norm_eval(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
) -> Wide:
    """See `bnfast.functional.batch_norm_eval`."""
    x = _wide(x)
    inv_std = 1 / np.sqrt(_along(var, x, axis, 1.0) + eps)
    x_hat = (x - _along(mean, x, axis, 0.0)) * inv_std
    return _written(_along(gamma, x, axis, 1.0) * x_hat + _along(beta, x, axis, 0.0), out)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    out: NDArray[Any] | None = None,
) -> tuple[Wide, Wide, Wide]:
    """See `bnfast.functional.batch_norm_backward`."""
    dy, x = _wide(dy), _wide(x)
    others = _other_axes(x, axis)
    scale = _along(inv_std, x, axis, 1.0)
    x_hat = (x - _along(mean, x, axis, 0.0)) * scale
    dbeta = dy.sum(others, keepdims=True)
    dgamma = (dy * x_hat).sum(others, keepdims=True)
    through_statistics = (dbeta + x_hat * dgamma) / max(1, x.size // max(1, x.shape[axis])) if training else 0.0
    dx = _along(gamma, x, axis, 1.0) * scale * (dy - through_statistics)
    return _written(dx, out), dgamma.ravel(), dbeta.ravel()


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
    out: NDArray[Any] | None = None,
) -> Wide:
    """See `bnfast.functional.batch_norm_jvp`."""
    v, x = _wide(v), _wide(x)
    others = _other_axes(x, axis)
    scale = _along(inv_std, x, axis, 1.0)
    x_hat = (x - _along(mean, x, axis, 0.0)) * scale
    centred = v - v.mean(others, keepdims=True) - x_hat * (v * x_hat).mean(others, keepdims=True)
    dy = _along(gamma, x, axis, 1.0) * scale * centred
    return _written(dy + _along(vgamma, x, axis, 0.0) * x_hat + _along(vbeta, x, axis, 0.0), out)
